// The page. Text of models and users goes into the document as text only, never as markup.

import { view } from "/page/attention.js";
import { answer, models, vote } from "/page/chat.js";
import { $, element } from "/page/dom.js";
import { chips, cut, read as readFiles, sources } from "/page/sources.js";

const DEFAULTS = {
  system: "", temperature: "0.7", top_p: "0.95", top_k: "", max_tokens: "512", seed: "",
  shade: false, key: "", model: "",
};
const KEPT = 50; // conversations
let settings = { ...DEFAULTS, ...read("treadle.settings", {}) };
let history = read("treadle.history", []);
let current = null; // the conversation that is shown
let running = null; // AbortController of the answer under way
let offered = [];

function read(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function write(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
  } catch {
    trouble("This browser keeps no more conversations; delete some.");
  }
}

function trouble(message) {
  $("trouble").textContent = message;
  $("trouble").hidden = !message;
}

// Settings

function showSettings() {
  for (const name of Object.keys(DEFAULTS)) {
    const field = $(name);
    if (field.type === "checkbox") field.checked = settings[name];
    else if (name !== "model") field.value = settings[name];
  }
  $("messages").classList.toggle("shade", settings.shade);
}

function changed(event) {
  const field = event.target;
  settings[field.id] = field.type === "checkbox" ? field.checked : field.value;
  write("treadle.settings", settings);
  $("messages").classList.toggle("shade", settings.shade);
  if (field.id === "key") loadModels();
}

function number(name) {
  const value = String(settings[name]).trim();
  return value === "" || Number.isNaN(Number(value)) ? undefined : Number(value);
}

async function loadModels() {
  try {
    offered = await models(settings.key);
  } catch (error) {
    trouble(error.message);
    return;
  }
  trouble("");
  $("model").replaceChildren(
    ...offered.map((m) => {
      const note = m.parent ? ` (on ${m.parent})` : m.trial ? " (trial)" : "";
      return element("option", { value: m.id, text: m.id + note });
    }),
  );
  if (offered.some((m) => m.id === settings.model)) $("model").value = settings.model;
}

// Theme

function theme(wanted) {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = wanted ?? (dark ? "dark" : "light");
}

// History

function save(conversation) {
  if (conversation?.messages.length && !history.includes(conversation)) history.unshift(conversation);
  history = history.slice(0, KEPT);
  // a browser keeps about 5 MB: only the conversation that is shown keeps its tokens
  const plain = ({ pieces, ...message }) => message;
  const slim = (other) => (other === current ? other : { ...other, messages: other.messages.map(plain) });
  write("treadle.history", history.map(slim));
  showHistory();
}

function showHistory() {
  $("conversations").replaceChildren(
    ...history.map((conversation) => {
      const title = conversation.messages[0]?.text.slice(0, 60) || "…";
      const open = element("button", { type: "button", text: title, title });
      const remove = element("button", { type: "button", text: "×", ariaLabel: `Delete ${title}` });
      open.addEventListener("click", () => show(conversation));
      remove.addEventListener("click", () => {
        history = history.filter((other) => other !== conversation);
        if (current === conversation) show(null);
        save(null);
      });
      const row = element("li", {}, open, remove);
      if (conversation === current) row.setAttribute("aria-current", "true");
      return row;
    }),
  );
}

function show(conversation) {
  running?.abort();
  current = conversation ?? { messages: [] };
  drawer("history", "show-history", false);
  const drawn = current.messages.map((message) => draw(message).box);
  const hint = element("p", { className: "empty", text: "Ask something. Hover over an answer to see how likely each token was." });
  $("messages").replaceChildren(...(drawn.length ? drawn : [hint]));
  $("messages").scrollTop = $("messages").scrollHeight;
  trouble("");
  showHistory();
  showDocuments();
}

// Documents

function showDocuments() {
  const documents = current.documents ?? [];
  $("documents").replaceChildren(...chips(documents, (index) => {
    current.documents = documents.filter((_, i) => i !== index);
    showDocuments();
  }));
  $("documents").hidden = !documents.length;
}

async function attach(files) {
  const conversation = current;
  trouble("");
  try {
    const present = conversation.documents ?? [];
    conversation.documents = [...present, ...(await readFiles(files, present))];
  } catch (error) {
    trouble(error.message);
  }
  if (conversation === current) showDocuments();
}

// Messages

function draw(message) {
  const text = element("div", { className: "text" });
  const thought = element("div", { className: "thought", text: message.reasoning ?? "" });
  const thinking = element("details", { hidden: !message.reasoning }, element("summary", { text: "Reasoning" }), thought);
  const who = element("div", { className: "who", text: message.role === "user" ? "You" : message.model });
  const foot = element("footer");
  const box = element("article", { className: `message ${message.role}` }, who, thinking, text, foot);
  for (const piece of message.pieces ?? cut(message)) place(text, piece);
  if (message.votable) who.append(votes(message));
  const drawn = { box, text, thought, thinking, who, foot };
  if (message.role === "assistant" && message.text) finish(drawn, message);
  return drawn;
}

// What a whole answer has and one on its way has not.
function finish({ who, text, foot }, message) {
  if (message.sources?.length) foot.append(sources(message, text));
  if (offered.find((m) => m.id === message.model)?.trial) return;
  const button = element("button", { type: "button", className: "plain", text: "Attention", ariaExpanded: "false" });
  let shown = null;
  button.addEventListener("click", () => {
    if (shown) shown.remove();
    shown = shown ? null : view(asked(message), settings.key);
    button.ariaExpanded = String(Boolean(shown));
    if (shown) foot.append(shown);
  });
  who.append(button);
}

// The conversation up to an answer, as the server is asked about it.
function asked(message) {
  const before = current.messages.slice(0, current.messages.indexOf(message) + 1);
  const documents = message.sources?.map(({ title, text }) => ({ title, text }));
  return { model: message.model, messages: turnsOf(before, message.system ?? ""), documents };
}

function place(text, piece) {
  const span = element("span", { text: piece.text });
  if (piece.tokens.length) {
    const p = Math.min(...piece.tokens.map((token) => Math.exp(token.logprob)));
    span.className = `token p${p < 0.1 ? 0 : p < 0.4 ? 1 : p < 0.7 ? 2 : p < 0.95 ? 3 : 4}`;
    span.addEventListener("pointerenter", () => tip(span, piece.tokens));
    span.addEventListener("pointerleave", () => { $("tip").hidden = true; });
  }
  text.append(span);
}

function tip(span, tokens) {
  const rows = tokens.flatMap((token) => {
    const others = token.top_logprobs.filter((other) => other.token !== token.token);
    return [{ ...token, chosen: true }, ...others];
  });
  const body = rows.map((row) => {
    const percent = (100 * Math.exp(row.logprob)).toFixed(1);
    return element("tr", { className: row.chosen ? "chosen" : "" },
      element("td", { text: JSON.stringify(row.token) }), element("td", { text: `${percent}%` }));
  });
  const box = $("tip"), place = span.getBoundingClientRect();
  box.replaceChildren(element("table", {}, element("tbody", {}, ...body)));
  box.hidden = false;
  const left = Math.min(place.left, innerWidth - box.offsetWidth - 8);
  const under = place.bottom + 6 + box.offsetHeight < innerHeight;
  box.style.left = `${Math.max(8, left)}px`;
  box.style.top = `${under ? place.bottom + 6 : place.top - box.offsetHeight - 6}px`;
}

function votes(message) {
  const box = element("span", { className: "votes" });
  for (const [good, text] of [[true, "Good"], [false, "Bad"]]) {
    const button = element("button", { type: "button", text, className: "plain" });
    button.addEventListener("click", async () => {
      try {
        await vote(message.id, good, settings.key);
        message.votable = false;
        box.replaceChildren(good ? "voted good" : "voted bad");
        save(null);
      } catch (error) {
        trouble(error.message);
      }
    });
    box.append(button);
  }
  return box;
}

function turnsOf(messages, system) {
  const turns = messages
    .filter((message) => message.text)
    .map(({ role, text }) => ({ role, content: text }));
  return system.trim() ? [{ role: "system", content: system }, ...turns] : turns;
}

function request() {
  const messages = turnsOf(current.messages, settings.system);
  const body = { model: $("model").value, messages, logprobs: true, top_logprobs: 5, user: user() };
  if (current.documents?.length) body.documents = current.documents;
  for (const name of ["temperature", "top_p", "top_k", "max_tokens", "seed"]) {
    if (number(name) !== undefined) body[name] = number(name);
  }
  return body;
}

function user() {
  const known = localStorage.getItem("treadle.user");
  if (known) return known;
  const made = crypto.getRandomValues(new Uint32Array(4)).join("-");
  localStorage.setItem("treadle.user", made);
  return made;
}

async function ask(text) {
  const conversation = current;
  if (!conversation.messages.length) $("messages").replaceChildren();
  conversation.messages.push({ role: "user", text });
  $("messages").append(draw(conversation.messages.at(-1)).box);
  const body = request();
  const message = { role: "assistant", model: body.model, text: "", reasoning: "", pieces: [], system: settings.system };
  const drawn = draw(message);
  $("messages").append(drawn.box);
  busy(new AbortController());
  try {
    for await (const part of answer(body, { key: settings.key, signal: running.signal })) {
      message.id = part.id;
      message.model = part.model ?? message.model; // of a route, the adapter that it chose
      message.text += part.text;
      message.reasoning += part.reasoning;
      message.pieces.push(...part.pieces);
      if (part.sources) Object.assign(message, { sources: part.sources, citations: part.citations ?? [] });
      follow(() => {
        for (const piece of part.pieces) place(drawn.text, piece);
        drawn.thought.textContent = message.reasoning;
        drawn.thinking.hidden = !message.reasoning;
      });
      if (part.finish === "length") drawn.who.append(element("span", { text: "cut at the token limit" }));
    }
    if (message.model !== body.model) drawn.who.firstChild.textContent = `${body.model}: ${message.model}`;
    message.votable = offered.some((m) => m.id === body.model && m.trial);
    if (message.votable) drawn.who.append(votes(message));
  } catch (error) {
    if (error.name === "AbortError") drawn.who.append(element("span", { text: "stopped" }));
    else trouble(error.message);
  }
  busy(null);
  if (message.text || message.reasoning) conversation.messages.push(message);
  else drawn.box.remove();
  if (message.text) follow(() => finish(drawn, message));
  save(conversation);
}

// Scrolls along unless the reader has scrolled up.
function follow(change) {
  const box = $("messages");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  change();
  if (atEnd) box.scrollTop = box.scrollHeight;
}

function busy(controller) {
  running = controller;
  $("send").hidden = Boolean(controller);
  $("stop").hidden = !controller;
}

function drawer(panel, button, open) {
  if (panel === "history") $(panel).classList.toggle("open", open);
  else $(panel).hidden = !open;
  $(button).setAttribute("aria-expanded", String(open));
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || running) return;
  $("text").value = "";
  trouble("");
  ask(text);
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("attach").addEventListener("click", () => $("files").click());
$("files").addEventListener("change", async () => {
  await attach([...$("files").files]);
  $("files").value = "";
});
$("talk").addEventListener("dragover", (event) => event.preventDefault());
$("talk").addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) attach([...event.dataTransfer.files]);
});
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => { show(null); $("text").focus(); });
$("model").addEventListener("change", changed);
$("settings").addEventListener("change", changed);
$("reset").addEventListener("click", () => {
  settings = { ...DEFAULTS, key: settings.key, model: settings.model };
  write("treadle.settings", settings);
  showSettings();
});
$("show-settings").addEventListener("click", () => drawer("settings", "show-settings", $("settings").hidden));
$("show-history").addEventListener("click", () =>
  drawer("history", "show-history", !$("history").classList.contains("open")));
$("theme").addEventListener("click", () => {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  write("treadle.theme", next);
  theme(next);
});

theme(read("treadle.theme", undefined));
showSettings();
show(null);
loadModels();
