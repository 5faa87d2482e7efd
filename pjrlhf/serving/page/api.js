// Requests to the server. The key lives in this tab alone.

const KEY = "pjrlhf.key";

export class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  clear: () => sessionStorage.removeItem(KEY),
};

function headers(body) {
  const found = {};
  if (body !== undefined) found["Content-Type"] = "application/json";
  // A header holds bytes; a key may hold any text.
  if (key.get()) {
    const bytes = new TextEncoder().encode(key.get());
    found.Authorization = "Bearer " + String.fromCharCode(...bytes);
  }
  return found;
}

async function send(path, method, body, signal) {
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), {
      method,
      headers: headers(body),
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new Failure("The server does not answer; start it again, or wait and try once more.");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  let message = `The server answered with status ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not from this server, a proxy for example: the status says all there is.
  }
  return new Failure(message, response.status);
}

export async function call(path, method = "GET", body = undefined) {
  const response = await send(path, method, body);
  const text = await response.text();
  return text ? JSON.parse(text) : null;
}

// The chunks of a streamed answer, as objects (server-sent events).
export async function* stream(path, body, signal) {
  const response = await send(path, "POST", { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  let whole = false;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      buffer += value;
      const events = buffer.split("\n\n");
      buffer = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: ")) continue;
        const data = event.slice(6);
        if (data === "[DONE]") {
          whole = true;
          continue;
        }
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Failure(chunk.error.message);
        yield chunk;
      }
    }
  } catch (problem) {
    if (problem instanceof TypeError) throw new Failure("The connection broke off; ask again.");
    throw problem;
  } finally {
    reader.cancel().catch(() => {});
  }
  if (!whole) throw new Failure("The answer broke off; ask again.");
}
