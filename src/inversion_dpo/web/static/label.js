// Labelling. A label is sent until the server has said that it is stored; then the next pair is
// shown. The id of a request stays the same when it is sent again, so that it counts once.

import { element, get, post, requestId } from "./common.js";

const KEYS = { 1: "left", ArrowLeft: "left", 2: "right", ArrowRight: "right", t: "tie", b: "bad", u: "undo" };
const TEAM_EVERY = 10; // labels
const labeller = element("label").dataset.labeller;
let pair = null;
let busy = true;
let sent = 0;

function note(text) {
  element("note").textContent = text;
  element("note").hidden = !text;
}

async function show(state) {
  pair = state.pair;
  element("progress").max = Math.max(1, state.total);
  element("progress").value = state.done;
  element("count").textContent = `${state.done} of ${state.total}`;
  element("pair").hidden = !pair;
  element("caption").textContent = pair ? pair.caption : "All pairs are labelled.";
  if (!pair) return;
  await Promise.all(["left", "right"].map((side) => load(element(side), pair[side])));
  for (const side of state.after ? ["left", "right"] : []) new Image().src = `/image/${state.after[side]}`;
}

async function load(img, sha256) {
  img.src = `/image/${sha256}`;
  await img.decode().catch(() => {});
  img.classList.toggle("small", img.naturalWidth <= 128);
}

async function untilStored(path, value) {
  for (let wait = 250; ; wait = Math.min(4000, 2 * wait)) {
    try {
      return await post(path, value);
    } catch (error) {
      if (error.status && error.status < 500) throw error;
      note("Not stored yet: the server does not answer. Trying again.");
      await new Promise((done) => setTimeout(done, wait));
    }
  }
}

async function choose(choice) {
  if (busy || (choice !== "undo" && !pair)) return;
  busy = true;
  const common = { request: requestId(), labeller };
  try {
    const state = choice === "undo"
      ? await untilStored("/api/undo", common)
      : await untilStored("/api/label", { ...common, pair: pair.pair, choice });
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

async function team() {
  const t = await get("/api/team").catch(() => null);
  if (!t) return;
  const parts = t.labellers.map((l) => `${l.labeller} ${l.done}`);
  let text = parts.length ? `${parts.join(", ")} of ${t.total} pairs.` : "";
  if (t.pairs) {
    text += ` On ${t.pairs} pairs labelled by two or more, ${Math.round(100 * t.same)}% of choices agree`;
    text += t.alpha === null ? "." : ` (Krippendorff's α ${t.alpha.toFixed(2)}).`;
  }
  element("team").textContent = text;
}

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input")) return;
  const choice = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!choice) return;
  event.preventDefault();
  choose(choice);
});
for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => { button.blur(); choose(button.dataset.choice); });
}
element("who").addEventListener("submit", (event) => {
  event.preventDefault();
  location.search = new URLSearchParams({ labeller: element("name").value });
});

async function begin() {
  try {
    await show(await get(`/api/next?${new URLSearchParams({ labeller })}`));
    busy = false;
    element("label").dataset.shown = sent;
  } catch (error) {
    note(`The server does not answer (${error.message}). Reload this page.`);
  }
  team();
}
begin();
