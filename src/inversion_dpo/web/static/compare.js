// Reference against policy from the same noise, and the film strip of an inversion.

import { element, get, image, made, post } from "./common.js";

const number = (id) => Number(element(id).value);

function note(text) {
  element("note").textContent = text;
  element("note").hidden = !text;
}

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

function cell(prompt, seed, reference, policy) {
  const images = [reference, policy].filter(Boolean).map((name, k) => {
    const img = image(name, `${k ? "policy" : "reference"}, seed ${seed}`);
    img.className = k ? "over" : "under";
    img.addEventListener("click", () => film(name, prompt));
    img.addEventListener("load", () => img.classList.toggle("small", img.naturalWidth <= 128));
    return img;
  });
  return made("figure", {}, made("div", { className: "wipe" }, ...images), made("figcaption", { textContent: `seed ${seed}` }));
}

async function sample() {
  const prompt = element("prompt").value;
  const model = element("model").value;
  const asked = {
    prompts: Array(number("count")).fill(prompt),
    seed: number("seed"), steps: number("steps"), guidance: number("guidance"),
  };
  const reference = await post("/api/samples", { ...asked, model: "reference" });
  const policy = model === "reference" ? null : await post("/api/samples", { ...asked, model });
  const cells = reference.seeds.map((seed, k) => cell(prompt, seed, reference.images[k], policy?.images[k]));
  element("which").textContent = model;
  element("grid").replaceChildren(...cells);
  element("result").hidden = false;
}

function wipe() {
  element("grid").style.setProperty("--cut", `${element("slider").value}%`);
  element("grid").classList.toggle("beside", element("beside").checked);
  element("slider").hidden = element("beside").checked;
}

async function pair() {
  const found = await get(`/api/pair?number=${number("number")}`);
  element("paircaption").textContent = found.caption;
  element("choices").replaceChildren(...found.images.map((name) => {
    const img = image(name, "of the pair");
    img.addEventListener("load", () => img.classList.toggle("small", img.naturalWidth <= 128));
    return made("button", { className: "pick", onclick: () => film(name, found.caption) }, img);
  }));
}

async function film(name, caption) {
  await busy(element("go"), async () => {
    const strip = await post("/api/strip", { image: name, caption });
    element("frames").replaceChildren(...strip.frames.map((frame) => made(
      "figure", {}, image(frame.image, `state at t = ${frame.timestep}`), made("figcaption", { textContent: `t = ${frame.timestep}` }),
    )));
    element("original").src = `/image/${strip.original}`;
    element("again").src = `/image/${strip.reconstruction}`;
    element("numbers").textContent = `“${caption}”: ${strip.psnr} dB between the decoded latent and its `
      + `reconstruction; relative error of the latent ${strip.error}; variance of the recovered noise ${strip.variance} `
      + "(sampling starts from 1).";
    element("film").hidden = false;
    element("film").scrollIntoView({ block: "nearest" });
  });
}

element("ask").addEventListener("submit", (event) => { event.preventDefault(); busy(element("go"), sample); });
element("pick")?.addEventListener("submit", (event) => { event.preventDefault(); busy(element("go"), pair); });
element("slider").addEventListener("input", wipe);
element("beside").addEventListener("change", wipe);
wipe();
