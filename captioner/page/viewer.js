// One picture, the words of a caption, and the map of the word that is chosen or pointed at. `stage.js` and `compare.js`
// stand behind this text.

const MAP_SIDE_PX = 640;
const THUMBNAIL_PX = { width: 192, height: 144 };

const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
const make = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};
const percent = (p) => (p < 0.01 ? "<1%" : Math.round(100 * p) + "%");
const minus = (score) => (score === null ? "impossible" : score.toFixed(2).replace("-", "\u2212"));
const part = (name, root = element) => root.querySelector("[data-part=" + name + "]");

// How every map of the page is drawn; the stage changes it and says so by the event "captioner:drawing".
const drawing = (window.captionerDrawing ??= { opacity: 0.65, colours: "viridis", fade: true });

// As captioner.geometry.grid_to_picture: bilinear between the centres of the cells, constant beyond them.
function taps(cells, pixels) {
  return Array.from({ length: pixels }, (_, pixel) => {
    const position = ((pixel + 0.5) * cells) / pixels - 0.5;
    const low = Math.min(Math.max(Math.floor(position), 0), cells - 1);
    return [low, Math.min(low + 1, cells - 1), Math.min(Math.max(position - low, 0), 1)];
  });
}

// As captioner.overlay.tint; here the browser does the blending. `map` holds values from 0 to 255, row by row.
function paint(canvas, map, [rows, columns], palette, opacity) {
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  const across = taps(columns, canvas.width);
  let at = 0;
  for (const [top, bottom, down] of taps(rows, canvas.height)) {
    for (const [left, right, share] of across) {
      const upper = map[top * columns + left] * (1 - share) + map[top * columns + right] * share;
      const lower = map[bottom * columns + left] * (1 - share) + map[bottom * columns + right] * share;
      const strength = (upper * (1 - down) + lower * down) / 255;
      const colour = 3 * Math.min(Math.floor(strength * 256), 255);
      pixels.data[at] = palette[colour];
      pixels.data[at + 1] = palette[colour + 1];
      pixels.data[at + 2] = palette[colour + 2];
      pixels.data[at + 3] = Math.round(255 * opacity * (0.35 + 0.65 * strength));
      at += 4;
    }
  }
  context.putImageData(pixels, 0, 0);
}

// Whether the mouse itself has moved. Words that come to lie under a resting mouse, since the page was scrolled or a line
// has grown, are not pointed at: the browser says "over" of them all the same, and some say "move" at the same place.
let mouseAt = "", mouseMoved = false;
document.addEventListener("pointermove", (event) => {
  const at = event.screenX + "," + event.screenY;
  mouseMoved = at !== mouseAt;
  mouseAt = at;
}, true);

function fitted({ width, height }, box) {
  const scale = Math.min(box.width / width, box.height / height);
  return { width: Math.max(1, Math.round(width * scale)), height: Math.max(1, Math.round(height * scale)) };
}

const palettes = Object.fromEntries(Object.entries(props.palettes).map(([name, text]) => [name, bytes(text)]));

// `parts`: { frame, picture, map, words } and, where there are any, { strip, legend }. `said` is told the
// word whose map is seen, and whether that map is even.
function makeViewer(parts, said) {
  let photo = null, caption = null, chosen = -1, pointed = -1, head = -1;
  const groups = [parts.words, parts.strip].filter(Boolean);

  function mapOf(index) {
    const [rows, columns] = caption.grid;
    const [layers, heads] = caption.heads;
    const size = rows * columns;
    const from = head < 0 || !caption.headMaps.length ? index * size : (index * layers * heads + head) * size;
    return (head < 0 || !caption.headMaps.length ? caption.maps : caption.headMaps).subarray(from, from + size);
  }

  // The tint of a word that the model is unsure of is weaker, unless the user wants all alike.
  const opacityOf = (word) => drawing.opacity * (drawing.fade ? 0.6 + 0.4 * word.probability : 1);

  function paintWord(canvas, index) {
    paint(canvas, mapOf(index), caption.grid, palettes[drawing.colours], opacityOf(caption.words[index]));
  }

  // The picture under the map of a word, for the strip and for a figure.
  function drawWord(canvas, index) {
    const context = canvas.getContext("2d");
    context.drawImage(parts.picture, 0, 0, canvas.width, canvas.height);
    if (index < 0) return;
    const map = make("canvas", { width: canvas.width, height: canvas.height });
    paintWord(map, index);
    context.drawImage(map, 0, 0);
  }

  function drawStrip() {
    if (!parts.strip || !caption || !parts.picture.complete || !parts.picture.naturalWidth) return;
    parts.strip.querySelectorAll("canvas").forEach((canvas, index) => drawWord(canvas, index));
  }

  function look() {
    const index = pointed >= 0 ? pointed : chosen;
    parts.map.hidden = index < 0;
    if (index >= 0) {
      Object.assign(parts.map, fitted(photo, { width: MAP_SIDE_PX, height: MAP_SIDE_PX }));
      paintWord(parts.map, index);
    }
    said(index < 0 ? null : caption.words[index], index >= 0 && isEven(mapOf(index)));
  }

  function choose(index) {
    chosen = index;
    pointed = -1;
    for (const group of groups) {
      Array.from(group.children).forEach((button, i) => {
        button.setAttribute("aria-pressed", String(i === index));
        button.tabIndex = i === Math.max(index, 0) ? 0 : -1;  // one stop for the Tab key; the arrows do the rest
      });
    }
    look();
  }

  function wordButton(word, old) {
    const button = old ?? make("button", { type: "button" }, make("b"), " ", make("small"));
    button.querySelector("b").textContent = word.text;
    button.querySelector("small").textContent = percent(word.probability);
    button.style.setProperty("--sure", word.probability);
    return button;
  }

  function stripButton(word) {
    const canvas = make("canvas", fitted(photo, THUMBNAIL_PX));
    canvas.setAttribute("aria-hidden", "true");
    return make("button", { type: "button" }, canvas, make("span", { textContent: word.text }));
  }

  // Words that stay keep their buttons, and with them the focus of the keyboard.
  function show(newPhoto, values, { keep = false } = {}) {
    photo = newPhoto;
    caption = { ...values, maps: bytes(values.maps), headMaps: bytes(values.head_maps) };
    parts.frame.style.setProperty("--aspect", photo.width / photo.height);
    const text = values.text || photo.name;
    if (parts.picture.alt !== text) parts.picture.alt = text;
    const same = parts.picture.src === photo.picture;
    if (!same) parts.picture.src = photo.picture;
    const old = Array.from(parts.words.children);
    const buttons = caption.words.map((word, index) => wordButton(word, old[index]));
    old.slice(buttons.length).forEach((button) => button.remove());
    parts.words.append(...buttons.slice(old.length));
    if (parts.strip) {
      parts.strip.replaceChildren(...caption.words.map(stripButton));
      if (same) drawStrip();
    }
    if (head >= caption.heads[0] * caption.heads[1]) head = -1;
    choose(keep && chosen < caption.words.length ? chosen : -1);
  }

  for (const group of groups) {
    const indexOf = (event) => Array.from(group.children).indexOf(event.target.closest("button"));
    let clicked = -1;  // a hand that trembles over the word it has just clicked does not point at it anew
    group.addEventListener("click", (event) => {
      const index = indexOf(event);
      if (index < 0) return;
      clicked = event.detail ? index : -1;  // 0: by a key
      choose(group.children[index].getAttribute("aria-pressed") === "true" ? -1 : index);
    });
    group.addEventListener("pointermove", (event) => {
      const index = indexOf(event);
      if (event.pointerType !== "mouse" || !mouseMoved || index === clicked) return;
      clicked = -1;
      if (index < 0 || index === pointed) return;
      pointed = index;
      look();
    });
    group.addEventListener("pointerleave", () => {
      clicked = -1;
      if (pointed < 0) return;
      pointed = -1;
      look();
    });
    group.addEventListener("keydown", (event) => {
      const here = indexOf(event), last = group.children.length - 1;
      const to = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: last }[event.key];
      if (event.key === "Escape") choose(-1);
      if (here < 0 || to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      const index = (to + last + 1) % (last + 1);
      choose(index);
      group.children[index].focus();
    });
  }
  parts.picture.addEventListener("load", drawStrip);
  document.addEventListener("captioner:drawing", () => {
    if (!caption) return;
    drawStrip();
    look();
  });

  return { show, drawWord, useHead: (index) => { head = index; drawStrip(); look(); } };
}

// A model without attention has the same share of every place: then the map points nowhere, and the words say so.
const isEven = (map) => map.length > 1 && map.every((value) => value === map[0]);
const sees = (word, even) => word === null
  ? "Choose a word to see where the model looked for it."
  : (even ? "The model read the photo as a whole for \u201c" : "Where the model looked for \u201c")
    + word.text + "\u201d (" + percent(word.probability) + " sure)";
