// What a run does, its curves, and samples; asked for again and again.

import { element, enlarge, get, image, made, note, post } from "./common.js";

const EVERY = 2000; // milliseconds
const SILENT = 120; // seconds without news after which a run may have been interrupted
const WIDTH = 320, HEIGHT = 150, LEFT = 56, BOTTOM = 18, TOP = 8, RIGHT = 6;
const PHASES = {
  waiting: ["Waiting", "The model is being loaded, or nothing runs yet."],
  encoding: ["Encoding", "Images become latents, prompts become embeddings.", "pairs"],
  inverting: ["Inverting", "The noise behind every image is recovered.", "pairs"],
  training: ["Training", "", "steps"],
  trained: ["Trained", "Next: judge it on the page Blind, or run inversion-dpo evaluate.", "steps"],
  sampling: ["Sampling", "Images for the evaluation are made and scored.", "images"],
  evaluated: ["Trained and evaluated", "Next: inversion-dpo report writes the report.", "steps"],
};
const ENDED = ["trained", "evaluated"];
// title, what it says, lines: name and column, or a column less that of the reference
const lines = (column, less = "") => [
  ["training", column, less && column + less],
  ["held out", `heldout_${column}`, less && `heldout_${column}${less}`],
];
const PANELS = [
  ["Loss", "What every step lowers. Single steps are noisy.", lines("loss")],
  ["Told apart", "Share of pairs whose winner the policy favours, or of single images that it favours as their thumb says, compared with the reference. Chance is 0.5.", lines("accuracy")],
  ["Margin", "How much more the policy favours the winner than the loser. Above 0 is right.", lines("margin")],
  ["Gradient factor", "How much a pair still pulls: 0.5 at the reference, near 0 once it is decided.", lines("gradient_factor")],
  ["Beta", "The tie to the reference, as objective.beta=auto adapts it.", [["training", "beta", ""]]],
  ["Winners: error less the reference's", "Below 0 the policy predicts winners better than the reference.", lines("winner_error", "_ref")],
  ["Losers: error less the reference's", "Above 0 the policy moves away from losers. If winners rise as well, images get worse.", lines("loser_error", "_ref")],
  ["Distance from the reference", "How far predictions have moved. A steep rise often shows in the images.", lines("drift")],
  ["Gradient norm", "How hard a step pulls, before clipping. Jumps mean trouble.", lines("grad_norm")],
];
const charts = new Map();
const drawn = new Set();
let wanted = false;
let prompts = null;

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function short(value) {
  const size = Math.abs(value);
  return size && (size < 0.001 || size >= 10000) ? value.toExponential(1) : String(+value.toPrecision(3));
}

function duration(seconds) {
  const minutes = Math.round(seconds / 60);
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return minutes < 90 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function points(curves, column, less) {
  if (!less) return curves[column] ?? [];
  const other = new Map(curves[less] ?? []);
  return (curves[column] ?? []).filter(([step]) => other.has(step)).map(([step, y]) => [step, y - other.get(step)]);
}

function chart(title, text) {
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title });
  const values = made("figcaption");
  const figure = made("figure", {}, made("h3", { textContent: title }), made("p", { className: "soft", textContent: text }), picture, values);
  const one = { figure, picture, values, at: null, data: [] };
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    one.at = ((event.clientX - box.left) / box.width) * WIDTH;
    draw(one);
  });
  picture.addEventListener("pointerleave", () => { one.at = null; draw(one); });
  element("panels").append(figure);
  return one;
}

// the curves, and the values where the pointer is, or the latest ones
function draw({ picture, values, at, data }) {
  const all = data.flatMap((line) => line.points).filter((p) => Number.isFinite(p[1]));
  const [xs, ys] = [all.map((p) => p[0]), all.map((p) => p[1])];
  const [x0, x1, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const pad = (high - low || Math.abs(high) || 1) * 0.06;
  const x = (v) => LEFT + ((v - x0) / (x1 - x0 || 1)) * (WIDTH - LEFT - RIGHT);
  const y = (v) => TOP + (1 - (v - low + pad) / (high - low + 2 * pad)) * (HEIGHT - TOP - BOTTOM);
  const clear = (v) => Math.abs(y(v) - y(0)) > 12; // its number would cover that of 0
  const rules = low < 0 && high > 0 ? [0, ...[low, high].filter(clear)] : [...new Set([low, high])];
  picture.replaceChildren(...rules.flatMap((v) => [
    svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(v), y2: y(v), class: v ? "rule" : "rule zero" }),
    svg("text", { x: LEFT - 5, y: y(v) + 4, "text-anchor": "end" }, short(v)),
  ]));
  picture.append(
    svg("text", { x: LEFT, y: HEIGHT - 4 }, String(x0)),
    svg("text", { x: WIDTH - RIGHT, y: HEIGHT - 4, "text-anchor": "end" }, `step ${x1}`),
  );
  const keys = data.map((line) => {
    const path = line.points.map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`);
    picture.append(svg("polyline", { points: path.join(" "), class: `line-${line.number}` }));
    const distance = (p) => Math.abs(x(p[0]) - (at ?? WIDTH));
    const near = line.points.reduce((best, p) => (distance(p) < distance(best) ? p : best));
    const dots = at === null && line.points.length < 30 ? line.points : [near];
    for (const p of dots) picture.append(svg("circle", { cx: x(p[0]), cy: y(p[1]), r: at === null ? 2.2 : 3.5, class: `dot-${line.number}` }));
    return made("span", { className: `key-${line.number}`, textContent: `${line.name} ${short(near[1])}${at === null ? "" : ` at step ${near[0]}`}` });
  });
  values.replaceChildren(...keys);
}

function head(run) {
  const [title, text, unit] = PHASES[run.name];
  element("phase").textContent = title;
  element("progress").max = run.total ?? 1;
  element("progress").value = run.total ? run.done : 0;
  const parts = unit ? [run.total ? `${run.done} of ${run.total} ${unit}` : `${run.done} ${unit}`] : [];
  if (run.left) parts.push(`about ${duration(run.left)} left`);
  element("count").textContent = [...parts, text].filter(Boolean).join(" · ");
  const late = !ENDED.includes(run.name) && run.silent > Math.max(SILENT, 20 * (run.rate ?? 0));
  note(late ? `No news for ${duration(run.silent)}. If the run was interrupted, the same command goes on from here.` : "");
}

function panels(curves) {
  for (const [title, text, sources] of PANELS) {
    const data = sources.map(([name, column, less], number) => ({ name, number, points: points(curves, column, less) }))
      .filter((line) => line.points.length);
    if (!data.length) continue;
    if (!charts.has(title)) charts.set(title, chart(title, text));
    draw(Object.assign(charts.get(title), { data }));
  }
}

// one model's picture of every prompt, beside the prompt
async function column(name, prompts) {
  element("drawing").textContent = `Sampling ${name} …`;
  const { images } = await post("/api/samples", { model: name, prompts, seed: 0 });
  if (!element("rows").childElementCount) {
    element("rows").append(...prompts.map((prompt) => made(
      "div", { className: "row" }, made("p", { textContent: prompt }), made("div", { className: "strip" }),
    )));
  }
  images.forEach((sha256, k) => {
    const strip = element("rows").children[k].lastElementChild;
    const img = image(sha256, `${name}: ${prompts[k]}`);
    strip.append(made("figure", { onclick: () => enlarge(
      [...strip.children].map((f) => ({ src: f.firstChild.src, name: f.lastChild.textContent })), [...strip.children].indexOf(img.parentElement),
    ) }, img, made("figcaption", { textContent: name })));
  });
  element("drawing").textContent = "";
}

// the reference first, then each policy the run has saved, one after another; while the run works
// only when somebody asks, since sampling takes its memory and time
async function samples(run) {
  element("draw").hidden = wanted || ENDED.includes(run.name);
  if (!element("draw").hidden) return;
  prompts ??= await get("/api/prompts");
  if (!prompts.length) return;
  for (const name of ["reference", ...run.policies]) {
    if (drawn.has(name)) continue;
    drawn.add(name);
    try {
      await column(name, prompts);
    } catch (error) {
      drawn.delete(name); // perhaps half written: the next round tries again
      element("drawing").textContent = `${name}: ${error.message}`;
      return;
    }
  }
}

async function round() {
  try {
    const run = await get("/api/run");
    head(run);
    panels(run.curves);
    await samples(run);
    document.body.dataset.rounds = 1 + Number(document.body.dataset.rounds ?? 0);
  } catch (error) {
    note(error.status ? error.message : "The server does not answer. Trying again.");
  }
  setTimeout(round, EVERY);
}
element("draw").addEventListener("click", () => { wanted = true; element("draw").hidden = true; });
round();
