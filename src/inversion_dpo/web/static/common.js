// What every page needs: requests that say why they failed.

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

export const image = (sha256, alt) => made("img", { src: `/image/${sha256}`, alt });

export function requestId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");
}
