// Documents that a user attaches, and the passages beneath an answer that it rests on.

import { element } from "/page/dom.js";

const LARGEST = 500_000; // characters of a conversation's documents: a browser keeps about 5 MB

export class Unreadable extends Error {}

export async function read(files, present) {
  const documents = [];
  let size = present.reduce((sum, document) => sum + document.text.length, 0);
  for (const file of files) {
    let text;
    try {
      text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    } catch {
      text = "\0";
    }
    if (text.includes("\0")) throw new Unreadable(`${file.name} is not plain text; attach its text as .txt or .md.`);
    size += text.length;
    if (size > LARGEST) throw new Unreadable(`${file.name} is too long: ${LARGEST / 1000} thousand characters may be attached.`);
    documents.push({ title: file.name.slice(0, 200), text });
  }
  return documents;
}

export function chips(documents, remove) {
  return documents.map((document, index) => {
    const drop = element("button", { type: "button", text: "×", ariaLabel: `Remove ${document.title}` });
    drop.addEventListener("click", () => remove(index));
    return element("li", {}, element("span", { text: document.title, title: document.title }), drop);
  });
}

// Text that has no tokens, in pieces that begin and end where citations do.
export function cut(message) {
  const bounds = (message.citations ?? []).flatMap(({ start, end }) => [start, end]);
  const points = [...message.text];
  const places = [...new Set([0, ...bounds, points.length])].sort((a, b) => a - b);
  return places.slice(1).map((end, i) => ({ text: points.slice(places[i], end).join(""), tokens: [] }));
}

// The list beneath the answer that `text` shows. A source lights up what rests on it, and the
// other way round.
export function sources(message, text) {
  const cited = new Map();
  for (const { start, end, source, by } of message.citations ?? []) {
    const spans = spansOf(text, start, end);
    cited.set(source, [...(cited.get(source) ?? []), ...spans]);
    if (by === "words") spans.at(-1).dataset.marks = `${spans.at(-1).dataset.marks ?? ""}[${source}]`;
  }
  const rows = message.sources.map((source) => row(source, cited.get(source.number) ?? []));
  const used = rows.filter((_, i) => cited.has(message.sources[i].number));
  const others = rows.filter((shown) => !used.includes(shown));
  const box = element("section", { className: "sources", ariaLabel: "Sources" });
  box.append(element("h3", { text: used.length ? "Sources" : "No sentence of this answer rests on a source" }));
  if (used.length) box.append(element("ul", {}, ...used));
  if (others.length) {
    const summary = element("summary", { text: `Read, not cited: ${others.length}` });
    box.append(element("details", {}, summary, element("ul", {}, ...others)));
  }
  return box;
}

function row(source, spans) {
  const name = element("b", { text: `[${source.number}] ${source.title}` });
  const start = element("span", { text: source.text });
  const shown = element("li", { tabIndex: 0 }, name, " ", start);
  const light = (on) => [shown, ...spans].forEach((one) => one.classList.toggle("lit", on));
  for (const [one, enter, leave] of [[shown, "focus", "blur"], ...[shown, ...spans].map((e) => [e, "pointerenter", "pointerleave"])]) {
    one.addEventListener(enter, () => light(true));
    one.addEventListener(leave, () => light(false));
  }
  shown.addEventListener("click", () => shown.classList.toggle("open"));
  shown.addEventListener("keydown", (event) => { if (event.key === "Enter") shown.classList.toggle("open"); });
  return shown;
}

// The server counts characters, JavaScript counts halves of the rarer ones.
function spansOf(text, start, end) {
  let at = 0;
  return [...text.children].filter((span) => {
    const from = at;
    at += [...span.textContent].length;
    return from < end && at > start;
  });
}
