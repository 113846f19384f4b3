// Curves and samples of a run, asked for again and again.

import { element, get, image, made, post } from "./common.js";

const EVERY = 2000; // milliseconds
const WIDTH = 320, HEIGHT = 150, LEFT = 46, BOTTOM = 18, TOP = 8, RIGHT = 6;
const SHOWN = 6; // prompts in a row of samples
const drawn = new Set();
let prompts = null;

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function short(value) {
  const size = Math.abs(value);
  return size && (size < 0.01 || size >= 10000) ? value.toExponential(0) : String(+value.toPrecision(3));
}

function chart(panel) {
  const points = panel.lines.flatMap((line) => line.points).filter((p) => Number.isFinite(p[1]));
  const [xs, ys] = [points.map((p) => p[0]), points.map((p) => p[1])];
  const [x0, x1, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const pad = (high - low || Math.abs(high) || 1) * 0.06;
  const x = (v) => LEFT + ((v - x0) / (x1 - x0 || 1)) * (WIDTH - LEFT - RIGHT);
  const y = (v) => TOP + (1 - (v - low + pad) / (high - low + 2 * pad)) * (HEIGHT - TOP - BOTTOM);
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": panel.title });
  for (const v of low === high ? [low] : [low, high]) {
    picture.append(
      svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(v), y2: y(v), class: "rule" }),
      svg("text", { x: LEFT - 5, y: y(v) + 4, "text-anchor": "end" }, short(v)),
    );
  }
  picture.append(
    svg("text", { x: LEFT, y: HEIGHT - 4 }, String(x0)),
    svg("text", { x: WIDTH - RIGHT, y: HEIGHT - 4, "text-anchor": "end" }, `step ${x1}`),
  );
  panel.lines.forEach((line, k) => {
    const path = line.points.map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`);
    picture.append(svg("polyline", { points: path.join(" "), class: `line-${k}` }));
    if (line.points.length < 30) {
      for (const p of line.points) picture.append(svg("circle", { cx: x(p[0]), cy: y(p[1]), r: 2.2, class: `dot-${k}` }));
    }
  });
  const names = panel.lines.length > 1
    ? panel.lines.map((line, k) => made("span", { className: `key-${k}`, textContent: line.name.replaceAll("_", " ") })) : [];
  return made("figure", {}, made("h3", { textContent: panel.title }), picture, made("figcaption", {}, ...names));
}

function show(run) {
  element("progress").max = run.steps;
  element("progress").value = run.step;
  const where = run.step ? `step ${run.step} of ${run.steps}` : "not training yet";
  element("count").textContent = `${where}, ${Math.round(run.seconds)} s${run.finished ? ", finished" : ""}`;
  element("panels").replaceChildren(...run.panels.map(chart));
}

function note(text) {
  element("note").textContent = text;
  element("note").hidden = !text;
}

async function captions() {
  const found = [];
  for (let k = 0; k < SHOWN; k += 1) {
    const pair = await get(`/api/pair?number=${k}`).catch(() => null);
    if (pair) found.push(pair.caption);
  }
  return found;
}

async function row(name) {
  prompts ??= await captions();
  if (!prompts.length) return;
  const { images } = await post("/api/samples", { model: name, prompts, seed: 0 });
  const pictures = images.map((sha256, k) => {
    const img = image(sha256, `${name}: ${prompts[k]}`);
    img.title = prompts[k];
    return img;
  });
  element("rows").append(made("h3", { textContent: name }), made("div", { className: "film" }, ...pictures));
}

// the reference first, then each policy the run has saved, one after another
async function samples(run) {
  for (const name of ["reference", ...run.policies]) {
    if (drawn.has(name)) continue;
    drawn.add(name);
    try {
      await row(name);
    } catch (error) {
      drawn.delete(name); // perhaps half written: the next round tries again
      note(`${name}: ${error.message}`);
      return;
    }
  }
  note("");
}

async function round() {
  try {
    const run = await get("/api/run");
    show(run);
    await samples(run);
    document.body.dataset.rounds = 1 + Number(document.body.dataset.rounds ?? 0);
  } catch (error) {
    note("The server does not answer. Trying again.");
  }
  setTimeout(round, EVERY);
}
round();
