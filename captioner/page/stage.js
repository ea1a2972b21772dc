// What is on the stage: the photo, its captions, which of them is shown; and the sentences that the user adds.
let run = 0, photo = null, captions = [], shown = 0, done = false;
const parts = Object.fromEntries(
  Array.from(element.querySelectorAll("[data-part]")).map((node) => [node.dataset.part, node]));

const viewer = makeViewer(parts, (word, even) => {
  parts.legend.hidden = word === null;
  if (done) parts.note.textContent = sees(word, even);
});

function fillSelect(select, options) {
  select.replaceChildren(...options.map(([value, text]) => make("option", { value, textContent: text })));
}

// Maps of single heads, where there is more than one.
function offerHeads([layers, heads]) {
  const key = layers + "x" + heads;
  parts["which-label"].hidden = layers * heads < 2;
  if (parts.which.dataset.key === key) return;
  parts.which.dataset.key = key;
  fillSelect(parts.which, [[-1, "Summary"]]);
  for (let layer = 0; layer < layers; layer += 1) {
    const group = make("optgroup", { label: "Layer " + (layer + 1) });
    for (let head = 0; head < heads; head += 1) {
      const text = "Layer " + (layer + 1) + ", head " + (head + 1);
      group.append(make("option", { value: layer * heads + head, textContent: text }));
    }
    parts.which.append(group);
  }
  viewer.useHead(-1);
}

function captionItem(caption, index) {
  const text = make("span", { textContent: caption.text });
  // The spaces are for the button's name: a screen reader reads it as one text.
  if (caption.own) text.append(" ", make("em", { textContent: "yours" }));
  if (!caption.finished) text.append(" ", make("em", { textContent: "cut short" }));
  const button = make("button", { type: "button" }, text, " ", make("span", { textContent: minus(caption.score) }));
  button.addEventListener("click", () => showCaption(index));
  return make("li", {}, button);
}

function showCaption(index, options) {
  shown = index;
  const caption = captions[index];
  offerHeads(caption.heads);
  viewer.show(photo, caption, options);
  parts.captions.querySelectorAll("button").forEach((button, i) => {
    button.setAttribute("aria-pressed", String(i === index));
  });
  parts.sure.hidden = caption.confidence === null;
  parts.sure.textContent = caption.sure;
  parts.alt.textContent = caption.alt;
  parts["alt-length"].textContent = caption.alt.length + " characters";
  say("");
}

function listCaptions() {
  parts.captions.replaceChildren(...captions.map(captionItem));
}

function ownAnswer(text, bad = false) {
  parts["own-answer"].textContent = text;
  parts["own-answer"].classList.toggle("bad", bad);
  parts.sentence.setAttribute("aria-invalid", String(bad));
}

function begin(message) {
  if (photo?.picture !== message.picture) captions = [];
  photo = message;
  parts.words.style.minHeight = "";
  parts.rest.classList.add("waiting");
  parts.sure.hidden = true;
  parts.sentence.value = "";
  ownAnswer("How likely does the model find it, and where would it look?");
}

// Words while they are found. What has been tall stays tall, so that nothing below jumps when the search ends.
function showWords(words) {
  viewer.show(photo, words, { keep: true });
  parts.words.style.minHeight = Math.max(parts.words.offsetHeight, parseFloat(parts.words.style.minHeight) || 0) + "px";
  parts.note.textContent = words.words.length
    ? "A first reading, word by word; the search for the best goes on \u2026"
    : "Looking at the photo \u2026";
}

function showResult(message) {
  captions = message.captions;
  parts.rest.classList.remove("waiting");
  listCaptions();
  showCaption(0);
  const sure = captions[0].confidence === null ? "" : " " + captions[0].sure;
  parts.live.textContent = "Caption: " + captions[0].text + sure;
}

function showError(message) {
  parts.live.textContent = "";
  parts.error.textContent = message.error;
  parts.error.hidden = false;
  if (!message.keep || !photo || !captions.length) {
    parts.result.hidden = true;
    return;
  }
  done = true;
  showResult({ captions });
}

function showScore(message) {
  if (message.score_error) {
    ownAnswer(message.score_error, true);
    return;
  }
  // One that is typed again takes its own place.
  captions = [...captions.filter((caption) => !caption.own || caption.text !== message.scored.text),
    { ...message.scored, own: true }];
  listCaptions();
  showCaption(captions.length - 1);
  ownAnswer("Score " + minus(message.scored.score) + "; the best caption has " + minus(captions[0].score) + ".");
}

function render() {
  const message = props.value;
  const scored = message && ("scored" in message || "score_error" in message);
  if (!message || message.run < run || (scored && message.run > run)) return;  // of another photo than is shown
  const fresh = message.run > run;
  run = message.run;
  parts.result.removeAttribute("aria-busy");
  if (scored) return showScore(message);
  parts.start.hidden = true;
  if (message.error) return showError(message);
  parts.error.hidden = true;
  parts.result.hidden = false;
  done = message.phase === "done";
  if (fresh) begin(message);
  if (done) showResult(message);
  else showWords(message.captions[0]);
  if (!fresh) return;
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  parts.words.scrollIntoView({ block: "nearest", behavior: calm ? "auto" : "smooth" });
}

// --- How maps are drawn ---

function redraw() {
  parts["opacity-said"].textContent = Math.round(100 * drawing.opacity) + "%";
  parts.opacity.setAttribute("aria-valuetext", parts["opacity-said"].textContent);
  const palette = palettes[drawing.colours];
  const stops = Array.from({ length: 33 }, (_, i) => {
    const at = 3 * Math.min(8 * i, 255);
    return "rgb(" + palette.slice(at, at + 3).join() + ")";
  });
  parts.scale.style.background = "linear-gradient(90deg," + stops + ")";
  document.dispatchEvent(new CustomEvent("captioner:drawing"));
}

fillSelect(parts.colours, Object.keys(palettes).map((name) => [name, name[0].toUpperCase() + name.slice(1)]));
parts.opacity.addEventListener("input", () => {
  drawing.opacity = parts.opacity.value / 100;
  redraw();
});
parts.colours.addEventListener("change", () => {
  drawing.colours = parts.colours.value;
  redraw();
});
parts.fade.addEventListener("change", () => {
  drawing.fade = parts.fade.checked;
  redraw();
});
parts.which.addEventListener("change", () => viewer.useHead(Number(parts.which.value)));

// --- The user's own sentence ---

parts.own.addEventListener("submit", (event) => {
  event.preventDefault();
  const sentence = parts.sentence.value.trim();
  if (!sentence) return ownAnswer("Write a sentence first.", true);
  ownAnswer("Reading it \u2026");
  trigger("score", { sentence });
});

// --- Copies and files ---

// Empty for a moment: a screen reader does not read a text again that takes the place of its like.
let saying = 0;
function say(text) {
  clearTimeout(saying);
  parts.done.textContent = "";
  saying = setTimeout(() => { parts.done.textContent = text; }, 100);
}

const fileName = (ending) => (photo.name.replace(/[.][^.]*$/, "") || "photo") + ending;

function save(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  say("Saved as " + name);
}

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    say(what + " copied");
  } catch {  // no permission, or no clipboard on a page that came over plain HTTP
    say("Your browser does not allow copying here; this is the text: " + text);
  }
}

// As captioner.overlay.draw_words: the picture, and under each word its map; here as it is seen on the page.
function drawFigure() {
  const caption = captions[shown];
  const cell = fitted(photo, { width: 320, height: 480 });
  const gap = 24, label = 34, columns = Math.min(5, caption.words.length + 1);
  const rows = Math.ceil((caption.words.length + 1) / columns);
  const canvas = make("canvas", { width: Math.max(640, columns * (cell.width + gap) + gap) });
  const context = canvas.getContext("2d");
  const family = "px system-ui, sans-serif";
  const lines = [""];
  context.font = "26" + family;
  for (const word of caption.text.split(" ")) {
    const longer = (lines.at(-1) + " " + word).trim();
    if (context.measureText(longer).width < canvas.width - 2 * gap) lines[lines.length - 1] = longer;
    else lines.push(word);
  }
  const top = gap + 36 * lines.length;
  canvas.height = top + rows * (cell.height + label + gap / 2) + gap;
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = "#111";
  context.textAlign = "center";
  context.font = "26" + family;
  lines.forEach((line, i) => context.fillText(line, canvas.width / 2, gap + 28 + 36 * i - 6));
  context.font = "19" + family;
  const left = (canvas.width - columns * (cell.width + gap) + gap) / 2;
  for (let i = 0; i <= caption.words.length; i += 1) {
    const x = left + (i % columns) * (cell.width + gap);
    const y = top + Math.floor(i / columns) * (cell.height + label + gap / 2);
    const panel = make("canvas", cell);
    viewer.drawWord(panel, i - 1);
    context.drawImage(panel, x, y + label);
    if (!i) continue;
    const word = caption.words[i - 1];
    context.fillText(word.text + "  " + percent(word.probability), x + cell.width / 2, y + label - 10, cell.width);
  }
  return canvas;
}

parts["copy-caption"].addEventListener("click", () => copy(captions[shown].text, "Caption"));
parts["copy-alt"].addEventListener("click", () => copy(captions[shown].alt, "Alt text"));
parts["save-figure"].addEventListener("click", () => {
  drawFigure().toBlob((blob) => save(blob, fileName("-captioned.png")), "image/png");
});
parts["save-record"].addEventListener("click", () => {
  const text = JSON.stringify(captions[shown].record, null, 2) + "\n";
  save(new Blob([text], { type: "application/json" }), fileName("-caption.json"));
});

// --- Between a click and the first answer ---

document.addEventListener("captioner:waiting", () => {
  parts.result.setAttribute("aria-busy", "true");  // not around the live regions, which would be silent
  parts.error.hidden = true;
  parts.start.textContent = "Looking at the photo \u2026";
  parts.live.textContent = "Looking at the photo.";
});
document.addEventListener("captioner:failed", () => {
  parts.result.removeAttribute("aria-busy");
  parts.start.hidden = true;
  // The server never said what became of the photo: what is shown is still of the one before, where there is one.
  showError({ error: "No answer came; too many may be asking at once. Please try again in a moment.", keep: true });
});
document.addEventListener("captioner:unread", () => ownAnswer("No answer came; please try again.", true));

// --- Photos from the camera and the clipboard ---

const NO_CAMERA = "There is no camera, or your browser does not let this page use it; choose a file instead.";
const NO_PASTE = "Your browser does not let this page read the clipboard; press Ctrl+V, or choose a file.";
const NO_PICTURE = "There is no picture in the clipboard; copy one, or choose a file.";

const tellError = (error) => {
  parts.start.hidden = Boolean(photo);
  showError({ error, keep: true });
};

// Gradio asks for these and does not mind a refusal, of which nobody but the console would hear.
function guard(owner, name, refused, found = () => {}) {
  const ask = owner?.[name]?.bind(owner);
  if (!ask) return;
  owner[name] = (...asked) => ask(...asked).then((answer) => {
    found(answer);
    return answer;
  }, (error) => {
    tellError(refused);
    error.told = true;
    throw error;
  });
}

guard(navigator.mediaDevices, "getUserMedia", NO_CAMERA);
guard(navigator.clipboard, "read", NO_PASTE, (items) => {
  const pictures = items.filter((item) => item.types.some((type) => type.startsWith("image/")));
  if (!pictures.length) tellError(NO_PICTURE);
});
window.addEventListener("unhandledrejection", (event) => {
  if (event.reason?.told) event.preventDefault();
});
// On a page that came over plain HTTP from another machine browsers offer neither.
document.body.classList.toggle("insecure", !window.isSecureContext);

// Ctrl+V anywhere but where text is written; Gradio has an icon for it alone.
const PHOTO = ".photo input[type=file]";
async function openFiles(files) {
  if (!document.querySelector(PHOTO)) {  // the box shows the camera
    document.querySelector('.photo [aria-label="Upload file"]')?.click();
    await new Promise((done) => setTimeout(done, 100));
  }
  const input = document.querySelector(PHOTO);
  if (!input) return;
  input.files = files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
}
document.addEventListener("paste", (event) => {
  const text = event.target.closest?.("input:not([type=file]), textarea, [contenteditable=true]");
  const files = new DataTransfer();
  const picture = Array.from(event.clipboardData?.files ?? []).find((file) => file.type.startsWith("image/"));
  if (picture) {
    event.preventDefault();
    files.items.add(picture);
    openFiles(files.files);
  } else if (!text) tellError(NO_PICTURE);
});

redraw();
watch("value", render);
render();
