"use strict";
const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const sets = data.sets.map((set) => ({ ...set, scores: floats(set.scores) }));
const idSet = sets.find((set) => set.id);
const updates = []; // functions of the threshold, called whenever it moves

// ---- helpers

/** Sorted scores, exactly the float32 values that Python has. */
function floats(base64) {
  return new Float32Array(Uint8Array.from(atob(base64), (char) => char.charCodeAt(0)).buffer);
}

/** Number of the sorted scores that are at most `limit`. */
function numUpTo(scores, limit) {
  let low = 0, high = scores.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (scores[middle] <= limit) low = middle + 1; else high = middle;
  }
  return low;
}

/** Number of scores above the threshold, compared as float32, as NumPy does. */
function numFlagged(scores, threshold) {
  return scores.length - numUpTo(scores, Math.fround(threshold));
}

/** The shortest decimal of the same float32, so that the number displayed is the number used. */
function shortest(value) {
  for (let digits = 1; digits <= 9; digits++) {
    const text = String(Number(value.toPrecision(digits)));
    if (Math.fround(Number(text)) === Math.fround(value)) return text;
  }
  return String(value);
}

function grouped(count) {
  return String(count).replace(/\B(?=(\d{3})+$)/g, ",");
}

function element(parent, tag, { text, ...attributes } = {}, namespace = parent.namespaceURI) {
  const made = document.createElementNS(namespace, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return parent.appendChild(made);
}

function drawing(parent, width, height, label) {
  const namespace = "http://www.w3.org/2000/svg"; // a name, never fetched
  return element(parent, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, namespace);
}

/** Round numbers from low to high, about `count` of them. */
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= rough);
  const result = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + 1e-9 * step; n++) result.push(Number((n * step).toPrecision(6)));
  return result;
}

/** Save rows of text as a CSV file; what a spreadsheet would take for a formula stays text. */
function save(name, rows) {
  const cell = (value) => {
    const text = String(value ?? "");
    const plain = typeof value === "string" && /^[=+\-@\t]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text;
    return /[",\n\r]/.test(plain) ? `"${plain.replaceAll('"', '""')}"` : plain;
  };
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([rows.map((row) => row.map(cell).join(",") + "\r\n").join("")], { type: "text/csv;charset=utf-8" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// ---- tables of metrics

const summary = byId("summary").tBodies[0];
for (const head of document.querySelectorAll("#summary .sort")) {
  const cell = head.parentElement, column = cell.cellIndex;
  head.addEventListener("click", () => {
    // the better numbers first, then the other way round; names from a to z
    const first = head.dataset.sign === "1" ? "descending" : "ascending";
    const way = cell.getAttribute("aria-sort") === first ? (first === "ascending" ? "descending" : "ascending") : first;
    for (const other of document.querySelectorAll("#summary [aria-sort]")) other.removeAttribute("aria-sort");
    cell.setAttribute("aria-sort", way);
    const sign = way === "ascending" ? 1 : -1;
    const text = (row) => row.cells[column].textContent.trim();
    const compare = (one, other) => {
      if (!head.dataset.sign) return sign * text(one).localeCompare(text(other));
      const [a, b] = [one, other].map((row) => parseFloat(text(row)));
      return Number.isNaN(a) || Number.isNaN(b) ? Number.isNaN(a) - Number.isNaN(b) : sign * (a - b);
    };
    summary.append(...[...summary.rows].sort(compare));
  });
}

byId("table-csv").addEventListener("click", () => {
  const names = [...document.querySelectorAll("#summary [scope=colgroup]")].flatMap((head) => Array(head.colSpan).fill(head.textContent.trim()));
  const keys = [...document.querySelectorAll("#summary .sort")].map((head) => head.firstChild.textContent.trim());
  const numbers = (row) => [...row.cells].slice(-names.length).map((cell) => { const text = cell.textContent.trim(); return text === "–" ? "" : text; });
  save("detection.csv", [
    ["method", ...names.map((name, i) => `${keys[i + 1]} ${name}`)],
    ...[...summary.rows].map((row) => [row.cells[0].firstChild.textContent.trim(), ...numbers(row)]),
  ]);
});

byId("table-set").addEventListener("change", (event) => {
  for (const group of byId("metrics").tBodies) group.hidden = event.target.value !== "" && group.dataset.set !== event.target.value;
});

// ---- counts

for (const set of sets) {
  const row = byId("counts").tBodies[0].insertRow();
  const head = element(row, "th", { scope: "row", text: set.name + " " });
  element(head, "small", { text: set.id ? "false alarms" : "detections" });
  element(row, "td", { text: grouped(set.scores.length) });
  const flagged = element(row, "td"), share = element(row, "td");
  const bar = element(element(row, "td", { class: set.id ? "bar id" : "bar" }), "span");
  updates.push((threshold) => {
    const count = numFlagged(set.scores, threshold), part = 100 * count / set.scores.length;
    flagged.textContent = grouped(count);
    share.textContent = part.toFixed(2);
    bar.style.width = `${part}%`;
  });
}

// ---- histograms

const BINS = 60, WIDTH = 320, HEIGHT = 170, LEFT = 34, BOTTOM = 22;
const xOf = (score) => LEFT + (WIDTH - LEFT) * (score - data.low) / (data.high - data.low);

function shares(scores) {
  const edges = Array.from({ length: BINS + 1 }, (_, i) => data.low + (data.high - data.low) * i / BINS);
  const below = edges.map((edge, i) => (i === 0 ? 0 : i === BINS ? scores.length : numUpTo(scores, edge)));
  return below.slice(1).map((count, i) => (count - below[i]) / scores.length);
}

function outline(values, yOf) {
  const steps = values.map((value, i) => `V${yOf(value).toFixed(2)}H${(LEFT + (WIDTH - LEFT) * (i + 1) / BINS).toFixed(2)}`);
  return `M${LEFT} ${yOf(0)}${steps.join("")}V${yOf(0)}Z`;
}

const histograms = sets.map((set) => ({ set, values: shares(set.scores) }));
const tallest = Math.max(...histograms.flatMap(({ values }) => values));
const idValues = histograms.find(({ set }) => set.id).values;
const shown = histograms.length > 1 ? histograms.filter(({ set }) => !set.id) : histograms;
for (const { set, values } of shown) {
  const figure = element(byId("histograms"), "figure"), caption = element(figure, "figcaption");
  element(caption, "span", { class: "swatch id", text: idSet.name });
  if (!set.id) element(caption, "span", { class: "swatch", text: set.name });
  const middle = (one) => shortest(one.scores[one.scores.length >> 1]);
  const svg = drawing(figure, WIDTH, HEIGHT, `Histogram of the ${data.main} score; median of ${idSet.name} ${middle(idSet)}, of ${set.name} ${middle(set)}`);
  const yOf = (share) => HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 8) * share / tallest;
  element(svg, "path", { class: "area-id", d: outline(idValues, yOf) });
  if (!set.id) element(svg, "path", { class: "area-ood", d: outline(values, yOf) });
  element(svg, "path", { class: "axis", d: `M${LEFT} ${yOf(0)}H${WIDTH}` });
  for (const tick of ticks(data.low, data.high, 5)) {
    element(svg, "path", { class: "axis", d: `M${xOf(tick)} ${yOf(0)}v4` });
    element(svg, "text", { x: xOf(tick), y: HEIGHT - 5, "text-anchor": xOf(tick) > WIDTH - 10 ? "end" : "middle", text: tick });
  }
  for (const tick of ticks(0, 100 * tallest, 3)) element(svg, "text", { x: LEFT - 5, y: yOf(tick / 100) + 4, "text-anchor": "end", text: `${tick}%` });
  const mark = element(svg, "line", { class: "mark", y1: 0, y2: yOf(0) });
  updates.push((threshold) => {
    const x = Math.min(Math.max(xOf(threshold), LEFT), WIDTH);
    mark.setAttribute("x1", x);
    mark.setAttribute("x2", x);
  });
}

// ---- ROC curves

const DASHES = ["", "7 3", "2 3", "9 3 2 3"]; // with the six colours, no two of 24 methods look alike
function dress(line, method) {
  const number = data.methods.indexOf(method);
  line.style.stroke = `var(--curve-${number % 6})`;
  line.style.strokeDasharray = method === data.main ? "" : DASHES[Math.floor(number / 6) % 4];
}

for (const method of data.methods) {
  const entry = element(byId("roc-legend"), "li");
  const svg = drawing(entry, 32, 8, "");
  svg.setAttribute("aria-hidden", "true");
  dress(element(svg, "path", { class: method === data.main ? "curve main" : "curve", d: "M0 4H32" }), method);
  element(entry, "span", { text: method });
}

for (const { set: name, curves } of data.roc) {
  const figure = element(byId("roc"), "figure"), size = 270, left = 44;
  element(element(figure, "figcaption"), "span", { text: name });
  const svg = drawing(figure, left + size + 8, size + 42, `ROC curves of ${curves.map((curve) => curve.method).join(", ")} on ${name}`);
  const x = (rate) => left + size * rate, y = (rate) => 6 + size * (1 - rate);
  element(svg, "path", { class: "chance", d: `M${x(0)} ${y(0)}L${x(1)} ${y(1)}` });
  element(svg, "path", { class: "axis", d: `M${x(0)} ${y(1)}V${y(0)}H${x(1)}` });
  for (const tick of [0, 0.5, 1]) {
    element(svg, "text", { x: x(tick), y: y(0) + 15, "text-anchor": "middle", text: tick });
    element(svg, "text", { x: left - 5, y: y(tick) + 4, "text-anchor": "end", text: tick });
  }
  element(svg, "text", { x: x(0.5), y: y(0) + 32, "text-anchor": "middle", text: "false positive rate" });
  element(svg, "text", { x: 0, y: 0, "text-anchor": "middle", transform: `translate(12 ${y(0.5)}) rotate(-90)`, text: "true positive rate" });
  for (const { method, fpr, tpr } of [...curves].sort((a, b) => (a.method === data.main) - (b.method === data.main))) {
    const d = "M" + fpr.map((rate, i) => `${x(rate).toFixed(2)} ${y(tpr[i]).toFixed(2)}`).join("L");
    dress(element(svg, "path", { class: method === data.main ? "curve main" : "curve", d }), method);
  }
  const set = sets.find((one) => one.name === name);
  if (set && curves.some((curve) => curve.method === data.main)) {
    const point = element(svg, "circle", { class: "point", r: 4.5 });
    updates.push((threshold) => {
      point.setAttribute("cx", x(numFlagged(idSet.scores, threshold) / idSet.scores.length));
      point.setAttribute("cy", y(numFlagged(set.scores, threshold) / set.scores.length));
    });
  }
}

// ---- gallery

const NEAR = 10; // images on each side of the threshold
const gallery = byId("cards"), enlarged = byId("enlarged");
const cards = [...gallery.children].map((item, i) => ({
  ...data.cards[i], item, setNumber: item.dataset.set, flag: item.querySelector(".flag"),
  isId: data.cards[i].set === idSet.name,
}));
let visible = cards, limit = 0;

function flagged(card) {
  return card.score > limit;
}

/** What is said of a card at the threshold; "" where there is nothing to say. */
function decision(card) {
  if (flagged(card)) return card.isId ? "false alarm" : "flagged";
  return card.isId ? "" : "missed";
}

function isMistake(card) {
  return flagged(card) === card.isId;
}

const FILTERS = {
  "": () => true,
  flagged,
  missed: (card) => decision(card) === "missed",
  alarm: (card) => decision(card) === "false alarm",
  wrong: (card) => card.label !== "" && card.label !== card.prediction,
};

/** Of these cards, the ones nearest to the threshold on either side. */
function nearThreshold(chosen) {
  const byDistance = [...chosen].sort((a, b) => Math.abs(a.score - limit) - Math.abs(b.score - limit));
  return new Set([true, false].flatMap((side) => byDistance.filter((card) => flagged(card) === side).slice(0, NEAR)));
}

function arrange() {
  const set = byId("gallery-set").value, show = byId("gallery-show").value;
  const [key, way] = byId("gallery-order").value.split("-"), sign = way === "up" ? 1 : -1;
  const part = byId("gallery-name").value.toLowerCase();
  let chosen = cards.filter((card) => (set === "" || card.setNumber === set) && card.name.toLowerCase().includes(part));
  const near = show === "near" ? nearThreshold(chosen) : null;
  chosen = chosen.filter(near ? (card) => near.has(card) : FILTERS[show]);
  const ordered = key ? [...cards].sort((a, b) => sign * (a[key] - b[key])) : cards; // stable
  const shown = new Set(chosen);
  for (const card of cards) card.item.hidden = !shown.has(card);
  visible = ordered.filter((card) => shown.has(card));
  if (ordered.some((card, i) => gallery.children[i] !== card.item)) gallery.replaceChildren(...ordered.map((card) => card.item));
  byId("gallery-status").textContent = visible.length === cards.length ? `${grouped(visible.length)} images` : `${grouped(visible.length)} of ${grouped(cards.length)} images`;
  byId("gallery-empty").hidden = visible.length > 0;
}
for (const id of ["gallery-set", "gallery-show", "gallery-order"]) byId(id).addEventListener("change", arrange);
byId("gallery-name").addEventListener("input", arrange);
for (const radio of document.querySelectorAll("[name=view]")) radio.addEventListener("change", () => { gallery.dataset.view = radio.value; });

updates.push((threshold) => {
  limit = Math.fround(threshold);
  for (const card of cards) {
    card.flag.textContent = decision(card);
    card.flag.hidden = decision(card) === "";
    card.flag.classList.toggle("mistake", isMistake(card));
  }
  if (!["", "wrong"].includes(byId("gallery-show").value)) arrange();
});

byId("gallery-csv").addEventListener("click", () => {
  save("images.csv", [
    ["set", "name", "score", "p_value", "threshold", "flagged", "distance", "prediction", "class"],
    ...visible.map((card) => [card.set, card.name, card.score, card.p_value, number.valueAsNumber, flagged(card), card.distance, card.prediction, card.label]),
  ]);
});

// ---- one image, large

let place = 0;

function enlarge(to) {
  place = (to + visible.length) % visible.length;
  const card = visible[place], words = decision(card) || "not flagged";
  byId("enlarged-title").textContent = `${card.name} (${card.set}): ${words}`;
  const pictures = document.createElement("div");
  pictures.className = "pictures";
  pictures.append(...[...card.item.querySelector(".pictures").children].map((picture) => picture.cloneNode(true)));
  byId("enlarged-body").replaceChildren(pictures, card.item.querySelector("dl").cloneNode(true));
  byId("enlarged-place").textContent = `${grouped(place + 1)} of ${grouped(visible.length)}`;
  if (!enlarged.open) enlarged.showModal();
}

for (const card of cards) card.item.querySelector(".pictures").addEventListener("click", () => enlarge(visible.indexOf(card)));
byId("enlarged-previous").addEventListener("click", () => enlarge(place - 1));
byId("enlarged-next").addEventListener("click", () => enlarge(place + 1));
byId("enlarged-close").addEventListener("click", () => enlarged.close());
enlarged.addEventListener("click", (event) => { if (event.target === enlarged) enlarged.close(); });
enlarged.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") enlarge(place - 1);
  if (event.key === "ArrowRight") enlarge(place + 1);
});
enlarged.addEventListener("close", () => visible[place]?.item.querySelector(".pictures").focus());

// ---- threshold

const slider = byId("threshold-slider"), number = byId("threshold-number");

function move(threshold) {
  slider.value = threshold;
  slider.setAttribute("aria-valuetext", `${shortest(threshold)}: ${sets.map((set) => `${set.name} ${(100 * numFlagged(set.scores, threshold) / set.scores.length).toFixed(1)} % flagged`).join(", ")}`);
  for (const update of updates) update(threshold);
}

/** Move, and show the number: not while it is being typed. */
function moveTo(threshold) {
  number.value = shortest(threshold);
  move(threshold);
}
slider.addEventListener("input", () => moveTo(slider.valueAsNumber));
number.addEventListener("input", () => { if (Number.isFinite(number.valueAsNumber)) move(number.valueAsNumber); });
number.addEventListener("blur", () => { if (!Number.isFinite(number.valueAsNumber)) moveTo(slider.valueAsNumber); });
byId("threshold-reset").addEventListener("click", () => moveTo(data.start));
moveTo(data.start);
