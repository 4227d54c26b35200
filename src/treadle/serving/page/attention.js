// What the tokens of an answer looked at: prompt and answer, shaded for the token that is chosen.

import { attention } from "/page/chat.js";
import { element } from "/page/dom.js";

// `asked` is the conversation up to and with the answer, as `attention` sends it.
export function view(asked, key) {
  const note = element("p", { className: "note", text: "Reading…" });
  const layer = element("select", { ariaLabel: "Layer" });
  const head = element("select", { ariaLabel: "Head" });
  const bar = element("div", { className: "bar", hidden: true },
    element("label", {}, "Layer ", layer), element("label", {}, "Head ", head));
  const prompt = element("div", { className: "looked" });
  const answer = element("div", { className: "looked answer" });
  const box = element("section", { className: "attention", ariaLabel: "Attention" }, bar, note, prompt, answer);
  let chosen = 0;

  async function load() {
    const found = await attention({ ...asked, layer: number(layer), head: number(head) }, key);
    bar.hidden = false;
    fill(layer, found.layers, "all");
    fill(head, found.heads, "all");
    const before = tokens(found.prompt), after = tokens(found.answer);
    after.forEach((span, i) => {
      span.tabIndex = 0;
      for (const event of ["click", "focus"]) span.addEventListener(event, () => choose(i));
    });
    function choose(i) {
      chosen = i;
      after.forEach((span, k) => span.classList.toggle("chosen", k === i));
      note.textContent = shade(found.weights[i], [...before, ...after]);
    }
    prompt.replaceChildren(...before);
    answer.replaceChildren(...after);
    choose(Math.min(chosen, after.length - 1));
  }

  const show = () => load().catch((error) => {
    note.textContent = error.message;
    prompt.replaceChildren();
    answer.replaceChildren();
  });
  for (const select of [layer, head]) select.addEventListener("change", show);
  show();
  return box;
}

function number(select) {
  return select.value === "" ? null : Number(select.value);
}

function fill(select, count, all) {
  if (select.options.length) return;
  select.append(element("option", { value: "", text: all }));
  for (let i = 0; i < count; i++) select.append(element("option", { value: String(i), text: String(i) }));
}

// A token inside a character is shown with the one that ends it.
function tokens(given) {
  const decoder = new TextDecoder();
  return given.map(({ bytes }) =>
    element("span", { text: decoder.decode(new Uint8Array(bytes), { stream: true }) }));
}

// Many heads rest on the first token: it is told, and the shades are relative to the largest other.
function shade(row, spans) {
  const largest = Math.max(...row.slice(1), 1e-6);
  spans.forEach((span, i) => {
    const strength = i && i < row.length ? row[i] / largest : 0;
    span.style.setProperty("--strength", `${Math.round(70 * strength)}%`);
    span.title = i < row.length ? percent(row[i]) : "";
    span.classList.toggle("later", i >= row.length);
  });
  const most = row.map((weight, i) => [weight, i]).slice(1).sort((a, b) => b[0] - a[0]).slice(0, 4);
  const named = most.map(([weight, i]) => `${JSON.stringify(spans[i].textContent)} ${percent(weight)}`);
  return `${percent(row[0])} at the first token, where heads rest; most at ${named.join(", ")}. Click a token of the answer to see what it looked at.`;
}

function percent(share) {
  return `${(100 * share).toFixed(1)}%`;
}
