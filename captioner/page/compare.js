// A column for each model: what it says of the photo on the stage, and where it looked.
const columns = [];  // what draws each
let run = 0, drawn = [];

function column(name) {
  const root = make("section", { className: "model" });
  root.setAttribute("aria-label", name);
  const score = make("small");
  const parts = {
    picture: make("img", { alt: "" }),
    map: make("canvas", { hidden: true }),
    frame: make("div", { className: "frame" }),
    words: make("div", { className: "words" }),
  };
  parts.map.setAttribute("aria-hidden", "true");
  parts.words.setAttribute("role", "group");
  parts.words.setAttribute("aria-label", "The caption of " + name + ", word by word");
  parts.frame.append(parts.picture, parts.map);
  const note = make("p", { className: "line" });
  note.setAttribute("role", "status");
  root.append(make("h3", {}, name, " ", score), parts.frame, parts.words, note);
  part("columns").append(root);
  const viewer = makeViewer(parts, (word, even) => { note.textContent = word === null ? "" : sees(word, even); });
  return (message, told) => {
    const caption = told.captions?.[0] ??
      { text: "", words: [], grid: [1, 1], heads: [1, 1], maps: "", head_maps: "", score: undefined };
    viewer.show(message, caption);
    score.textContent = caption.score === undefined ? "" : minus(caption.score);
    note.className = told.error ? "error" : "line";
    if (told.error || told.waiting) note.textContent = told.error ?? "Looking \u2026";
  };
}

function render() {
  const message = props.value;
  if (!message || message.run < run) return;
  if (message.run > run) drawn = [];
  run = message.run;
  part("all").hidden = !message.models;
  if (!message.models) return;
  message.models.forEach((told, index) => {
    columns[index] ??= column(told.name);
    const text = JSON.stringify(told);
    if (drawn[index] === text) return;  // a word may be chosen in it
    drawn[index] = text;
    columns[index](message, told);
  });
}

watch("value", render);
render();
