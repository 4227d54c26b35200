// The protocol: models, one streamed answer, votes. Knows nothing of the page.

export class Refused extends Error {}

function headers(key) {
  const all = { "content-type": "application/json" };
  if (key) all.authorization = `Bearer ${key}`;
  return all;
}

async function checked(response) {
  if (response.ok) return response;
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* not the server's own error: the status has to do */ }
  throw new Refused(message);
}

export async function models(key) {
  const response = await checked(await fetch("/v1/models", { headers: headers(key) }));
  return (await response.json()).data;
}

export async function vote(id, good, key) {
  const body = JSON.stringify({ id, good });
  await checked(await fetch("/v1/votes", { method: "POST", headers: headers(key), body }));
}

export async function attention(request, key) {
  const body = JSON.stringify(request);
  const response = await fetch("/v1/attention", { method: "POST", headers: headers(key), body });
  return (await checked(response)).json();
}

// Yields { id, model, text, reasoning, pieces, finish, sources, citations }.
export async function* answer(request, { key, signal }) {
  const body = JSON.stringify({ ...request, stream: true });
  const response = await checked(
    await fetch("/v1/chat/completions", { method: "POST", headers: headers(key), body, signal }),
  );
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(chunk.error.message);
    const choice = chunk.choices[0];
    if (!choice) continue;
    const calls = (choice.delta.tool_calls ?? []).map((c) => `${c.function.name}(${c.function.arguments})`);
    const text = (choice.delta.content ?? "") + calls.join("\n");
    yield {
      id: chunk.id,
      model: chunk.model,
      text,
      reasoning: choice.delta.reasoning_content ?? "",
      pieces: split(text, choice.logprobs?.content ?? []),
      finish: choice.finish_reason,
      sources: choice.delta.sources,
      citations: choice.delta.citations,
    };
  }
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      held += value;
      const whole = held.split("\n\n");
      held = whole.pop();
      for (const event of whole) {
        const lines = event.split("\n").filter((line) => line.startsWith("data: "));
        if (lines.length) yield lines.map((line) => line.slice(6)).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// The text as pieces, each with the tokens that spell it and their probabilities; where tokens do
// not spell the text (a stop string was cut off), one piece with all of them.
function split(text, tokens) {
  if (!text) return [];
  const decoder = new TextDecoder();
  const pieces = [];
  let waiting = []; // tokens of a character that is not whole yet
  for (const token of tokens) {
    waiting.push(token);
    const part = decoder.decode(new Uint8Array(token.bytes ?? []), { stream: true });
    if (!part) continue;
    pieces.push({ text: part, tokens: waiting });
    waiting = [];
  }
  if (!waiting.length && pieces.map((piece) => piece.text).join("") === text) return pieces;
  return [{ text, tokens }];
}
