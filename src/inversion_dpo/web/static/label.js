// Labelling. A label is sent until the server has said that it is stored; then the next pair is
// shown. The id of a request stays the same when it is sent again, so that it counts once.

import { element, enlarge, enlarged, get, note, post, requestId, sharp, shrink, turn } from "./common.js";

const KEYS = {
  pairs: { 1: "left", ArrowLeft: "left", 2: "right", ArrowRight: "right", t: "tie", b: "bad" },
  thumbs: { 1: "up", ArrowUp: "up", 2: "down", ArrowDown: "down", t: "unsure" },
  ratings: { 1: "1", 2: "2", 3: "3", 4: "4", 5: "5", t: "unsure" },
};
const TEAM_EVERY = 10; // labels
const POLL = 700; // milliseconds between looks for pairs that are still being made
const { labeller, page, kind } = element("label").dataset;
const keys = { ...KEYS[kind], u: "undo" };
const unit = kind === "pairs" ? "pair" : "image";
const sides = kind === "pairs" ? ["left", "right"] : ["left"];
const api = `/api/${page}`;
const asked = new URLSearchParams({ labeller });
let pair = null;
let busy = true;
let sent = 0;

async function show(state) {
  pair = state.pair;
  const waiting = !pair && state.done < state.total;
  element("progress").max = Math.max(1, state.total);
  element("progress").value = state.done;
  element("count").textContent = `${state.done} of ${state.total}`;
  element("pair").hidden = !pair;
  element("caption").textContent = pair ? pair.caption : waiting ? "The next images are being made …" : "";
  element("caption").scrollTop = 0;
  element("end").hidden = waiting || (pair && state.covered < state.total);
  element("ended").textContent = pair
    ? `Every ${unit} has a label. You can stop here, or give second opinions.`
    : `You have seen all ${unit}s. Thank you.`;
  if (waiting) {
    setTimeout(refresh, POLL);
  } else if (pair) {
    element("edited").hidden = !pair.source;
    const shown = pair.source ? [...sides, "source"] : sides;
    await Promise.all(shown.map((name) => load(element(name), pair[name])));
    for (const name of state.after ? shown : []) {
      if (state.after[name]) new Image().src = `/image/${state.after[name]}`;
    }
  }
}

async function load(img, sha256) {
  img.src = `/image/${sha256}`;
  await img.decode().catch(() => {});
  sharp(img);
}

async function untilStored(path, value) {
  for (let wait = 250; ; wait = Math.min(4000, 2 * wait)) {
    try {
      return await post(path, value);
    } catch (error) {
      if (error.status && error.status < 500) throw error;
      note(`Not stored yet: ${error.status ? error.message : "the server does not answer"}. Trying again.`);
      await new Promise((done) => setTimeout(done, wait));
    }
  }
}

async function choose(choice) {
  if (busy || (choice !== "undo" && !pair)) return;
  busy = true;
  shrink();
  const common = { request: requestId(), labeller };
  try {
    const state = choice === "undo"
      ? await untilStored(`${api}/undo`, common)
      : await untilStored(`${api}/choose`, { ...common, pair: pair.pair, choice });
    note("");
    await show(state);
    sent += 1;
    if (sent % TEAM_EVERY === 0 || !pair) team();
  } catch (error) {
    note(`Refused: ${error.message}`);
  } finally {
    busy = false;
    element("label").dataset.shown = sent;
  }
}

const percent = (share) => `${Math.round(100 * share)}%`;

async function team(result = false) {
  const t = await get(`${api}/team?${asked}`).catch(() => null);
  if (!t) return;
  const parts = t.labellers.map((l) => `${l.labeller} ${l.done}`);
  let text = parts.length ? `${parts.join(", ")} of ${t.total} ${unit}s.` : "";
  if (t.pairs) {
    text += ` On ${t.pairs} ${unit}s labelled by two or more, ${percent(t.same)} of choices agree`;
    text += t.alpha === null ? "." : ` (Krippendorff's α ${t.alpha.toFixed(2)}).`;
    text += kind === "ratings" ? " Where people disagree, the mean counts." : " Where people disagree, the majority counts.";
    if (kind !== "ratings") text += ` Without a majority ${unit === "pair" ? "a" : "an"} ${unit} counts as a tie${page === "blind" ? "" : ", and training leaves ties out"}: ${t.split} now.`;
  }
  element("team").textContent = text;
  const v = t.verdict;
  element("verdict").textContent = v?.pairs
    ? `People prefer the policy in ${percent(v.win_rate)} of ${v.pairs} pairs (95% interval ${percent(v.win_rate_low)} to `
      + `${percent(v.win_rate_high)}): ${v.wins} for the policy, ${v.losses} for the reference, ${v.even} even.`
    : "";
  if (result) element("team").textContent = element("verdict").textContent || "Nobody has judged a pair yet.";
}

function look(first) {
  if (enlarged()) turn();
  else if (pair) {
    const shown = sides.map((side) => ({ src: element(side).src, name: sides[1] ? side : "image" }));
    if (pair.source) shown.push({ src: element("source").src, name: "source" });
    enlarge(shown, first);
  }
}

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (!labeller || event.target.matches("input")) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key !== "z" && !keys[key]) return;
  event.preventDefault();
  if (key === "z") look(0);
  else choose(keys[key]);
});
for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => { button.blur(); choose(button.dataset.choice); });
}
for (const button of document.querySelectorAll("[data-look]")) {
  button.addEventListener("click", () => { button.blur(); look(Number(button.dataset.look)); });
}
element("result")?.addEventListener("click", () => team(true));
element("change").addEventListener("click", () => {
  element("who").hidden = false;
  element("label").hidden = true;
  element("name").select();
});
element("who").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = element("name").value.trim();
  localStorage.setItem("labeller", name);
  location.search = new URLSearchParams({ labeller: name });
});

async function refresh() {
  try {
    await show(await get(`${api}/next?${asked}`));
    note("");
  } catch (error) {
    note(error.status ? error.message : "The server does not answer. Reload this page.");
  }
}

async function begin() {
  element("caption").textContent = `Reading the ${unit}s …`;
  await refresh();
  busy = false;
  element("label").dataset.shown = sent;
  team();
}
if (labeller) begin();
else element("name").value = localStorage.getItem("labeller") ?? "";
