// Reference against policy from the same noise, and the film strip of an inversion.

import { element, enlarge, get, image, made, note, post } from "./common.js";

const number = (id) => Number(element(id).value);
const MOST = 16; // prompts in a request

async function busy(button, work) {
  button.disabled = true;
  note("");
  try {
    await work();
  } catch (error) {
    note(error.message);
  } finally {
    button.disabled = false;
  }
}

// one prompt and seed: the images in the order in which they are shown, each with its model's name
function cell(prompt, seed, sides, source) {
  const turned = Math.random() < 0.5;
  const images = sides.map(({ name, sha256 }, k) => {
    const img = image(sha256, `image of seed ${seed}`);
    img.className = k ? "over" : "under";
    img.addEventListener("click", () => enlarge(
      (hidden() && turned ? [...sides].reverse() : sides).map((side, j) => (
        { src: `/image/${side.sha256}`, name: hidden() ? "AB"[j] : side.name }
      )),
    ));
    return img;
  });
  const names = made("span", { className: "names" });
  const inverts = made("span", { className: "inverts" }, ...sides.map(({ name, sha256 }) => made("button", {
    textContent: `invert ${name}`, onclick: () => film(sha256, prompt),
  })));
  const wipe = made("div", { className: `wipe${turned ? " turned" : ""}` }, ...images);
  const order = turned ? [...sides].reverse() : sides;
  names.textContent = order.map(({ name }, k) => `${"AB"[k]} = ${name}`).join(", ");
  const edited = source ? [image(source, "source")] : [];
  return made("figure", {}, ...edited, wipe, made("figcaption", {}, `${prompt} · seed ${seed} `, names, inverts));
}

const hidden = () => element("blind").checked && element("grid").classList.contains("hidden");

async function sample() {
  const model = element("model").value;
  const models = [...new Set(["reference", model])];
  const lines = element("prompts").value.split("\n").map((line) => line.trim()).filter(Boolean);
  const prompts = lines.flatMap((line) => Array(number("count")).fill(line));
  const batch = Math.min(MOST, Number(element("ask").dataset.batch));
  const common = { steps: number("steps"), guidance: number("guidance"), side: number("side") || null };
  const total = prompts.length * models.length;
  let done = 0;
  const step = (more) => {
    done += more;
    element("progress").max = total;
    element("progress").value = done;
    element("count-done").textContent = `${done} of ${total} images`;
    element("work").hidden = done === total;
  };
  step(0);
  element("grid").replaceChildren();
  element("grid").dataset.model = model;
  element("grid").classList.toggle("hidden", element("blind").checked);
  element("result").hidden = false;
  arrange();
  try {
    for (let start = 0; start < prompts.length; start += batch) {
      const part = prompts.slice(start, start + batch);
      const sides = [];
      for (const name of models) {
        const answer = await post("/api/samples", { ...common, model: name, prompts: part, seed: number("seed") + start });
        sides.push({ name, ...answer });
        step(part.length);
      }
      element("grid").append(...part.map((prompt, k) => cell(
        prompt, sides[0].seeds[k], sides.map(({ name, images }) => ({ name, sha256: images[k] })), sides[0].sources[k],
      )));
    }
  } finally {
    element("work").hidden = true;
  }
}

function arrange() {
  const grid = element("grid");
  const model = grid.dataset.model; // that was sampled, whatever is chosen for the next time
  const alone = model === "reference";
  const blind = !alone && element("blind").checked;
  const beside = blind || (!alone && element("beside").checked);
  for (const name of ["beside", "blind"]) element(name).parentElement.hidden = alone;
  if (!blind) grid.classList.remove("hidden");
  grid.style.setProperty("--cut", `${element("slider").value}%`);
  grid.classList.toggle("beside", beside);
  grid.classList.toggle("blind", blind);
  element("slider").hidden = beside || alone;
  element("reveal").hidden = !blind;
  element("reveal").textContent = hidden() ? "Reveal" : "Hide";
  const sides = beside ? "Left the reference, right" : "Left of the line the reference, right of it";
  element("legend").textContent = blind
    ? "Each pair stands in an order of chance: A left, B right. To count your choices, use the page Blind."
    : alone ? "The reference. Click an image to enlarge it." : `${sides} ${model}, from the same noise. Click an image to enlarge it.`;
}

async function pair() {
  const found = await get(`/api/pair?number=${number("number")}`);
  element("paircaption").textContent = `“${found.caption}”. Click an image to invert it.`;
  element("choices").replaceChildren(...found.images.map((name) => made(
    "button", { className: "look", onclick: () => film(name, found.caption) }, image(name, "of the pair"),
  )));
}

async function film(name, caption) {
  await busy(element("go"), async () => {
    note("Inverting …");
    const strip = await post("/api/strip", { image: name, caption });
    note("");
    element("frames").replaceChildren(...strip.frames.map((frame) => made(
      "figure", {}, image(frame.image, `state at t = ${frame.timestep}`), made("figcaption", { textContent: `t = ${frame.timestep}` }),
    )));
    element("original").src = `/image/${strip.original}`;
    element("again").src = `/image/${strip.reconstruction}`;
    element("numbers").textContent = `“${caption}”: ${strip.psnr.toFixed(1)} dB between the decoded latent and its `
      + `reconstruction; relative error of the latent ${strip.error.toFixed(4)}; variance of the recovered noise `
      + `${strip.variance.toFixed(2)} (sampling starts from 1).`;
    element("film").hidden = false;
    element("film").scrollIntoView({ block: "nearest" });
  });
}

element("ask").addEventListener("submit", (event) => { event.preventDefault(); busy(element("go"), sample); });
element("pick").addEventListener("submit", (event) => { event.preventDefault(); busy(element("go"), pair); });
element("slider").addEventListener("input", arrange);
element("cell").addEventListener("input", () => element("grid").style.setProperty("--cell", `${element("cell").value}rem`));
element("beside").addEventListener("change", arrange);
element("blind").addEventListener("change", () => {
  element("grid").classList.toggle("hidden", element("blind").checked);
  arrange();
});
element("reveal").addEventListener("click", () => { element("grid").classList.toggle("hidden"); arrange(); });
arrange();
