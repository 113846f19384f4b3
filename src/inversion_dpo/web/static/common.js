// What every page needs: requests that say why they failed, pictures at full pixels.

export async function get(path) {
  return answer(await fetch(path, { cache: "no-store" }));
}

export async function post(path, value) {
  return answer(await fetch(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(value),
  }));
}

async function answer(response) {
  if (response.ok) return response.json();
  const error = new Error(await response.text());
  error.status = response.status;
  throw error;
}

export const element = (id) => document.getElementById(id);

export function made(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

export function note(text) {
  element("note").textContent = text;
  element("note").hidden = !text;
}

// a small image is shown with its pixels, not blurred; the style needs the shape of a tall one
export function sharp(img) {
  img.classList.toggle("small", img.naturalWidth <= 128);
  img.style.setProperty("--ratio", img.naturalWidth / img.naturalHeight || 1);
}

export function image(sha256, alt) {
  const img = made("img", { src: `/image/${sha256}`, alt });
  img.addEventListener("load", () => sharp(img));
  return img;
}

export function requestId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");
}

// ---------------------------------------------------------------- pictures at full pixels

let pictures = [];
let which = 0;
let dialog = null;

// pictures: [{ src, name }]; a click on the picture, or z, shows the next one at the same place
export function enlarge(shown, first = 0) {
  dialog ??= build();
  pictures = shown;
  if (!dialog.open) dialog.showModal();
  turn(first);
}

export const enlarged = () => Boolean(dialog?.open);
export const shrink = () => dialog?.close();
export const turn = (to = which + 1) => {
  which = to % pictures.length;
  const img = dialog.querySelector("img");
  img.src = pictures[which].src;
  dialog.querySelector(".names").replaceChildren(...pictures.map(({ name }, k) => made("button", {
    textContent: name, onclick: () => turn(k), ariaPressed: String(k === which),
  })));
};

function build() {
  const img = made("img", { alt: "at full pixels", onclick: () => turn() });
  const size = made("span", { className: "soft" });
  const view = made("div", { className: "view" }, img);
  img.addEventListener("load", () => {
    sharp(img);
    const ratio = window.devicePixelRatio || 1;
    const room = Math.min(view.clientWidth / img.naturalWidth, view.clientHeight / img.naturalHeight);
    const times = Math.max(1, Math.floor(room * ratio));
    img.style.width = `${(img.naturalWidth * times) / ratio}px`;
    size.textContent = `${img.naturalWidth} × ${img.naturalHeight} pixels, ${times} : 1`;
  });
  const close = made("button", { textContent: "Close", onclick: shrink });
  const bar = made("div", { className: "tools" }, made("span", { className: "names" }), size, close);
  const built = made("dialog", { className: "zoom" }, bar, view);
  document.body.append(built);
  return built;
}
