// Requests to the server: the key, errors as sentences, and server-sent events through fetch (EventSource can send no key).
import { el } from "./elements.js";

const KEY = "onym.key";

/** A failed request: `message` is the server's own sentence; `status` is 0 where no answer came; `retryAfter` in seconds or null. */
export class ApiError extends Error {
  constructor(message, status, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

function key() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null;
  }
}

/** Whether requests need the key: a plain link cannot send it. */
export const hasKey = () => key() !== null;

let asking = null; // one dialog, however many requests were refused

function askForKey(wrong) {
  asking ??= new Promise((resolve) => {
    const input = el("input", { type: "password", id: "api-key", autocomplete: "off", required: true });
    const dialog = el(
      "dialog",
      { className: "small", "aria-labelledby": "key-title" },
      el("h2", { id: "key-title" }, "API key"),
      el("p", {}, wrong ? "The server refused this key. Try another." : "This server needs its API key. It is kept until this tab is closed."),
      el("label", { htmlFor: "api-key" }, "Key"),
      input,
      el("p", { className: "row end" }, el("button", { type: "button", onclick: () => dialog.close() }, "Cancel"), el("button", { type: "button", className: "primary", onclick: accept }, "Use key")),
    );
    function accept() {
      dialog.returnValue = input.value.trim();
      dialog.close(dialog.returnValue);
    }
    input.addEventListener("keydown", (event) => event.key === "Enter" && accept());
    dialog.addEventListener("close", () => {
      dialog.remove();
      asking = null;
      if (dialog.returnValue) sessionStorage.setItem(KEY, dialog.returnValue);
      resolve(Boolean(dialog.returnValue));
    });
    document.body.append(dialog);
    dialog.showModal();
  });
  return asking;
}

/** What the server answered, where it is a success; else an ApiError. Asks for the key on 401. */
export async function request(path, { body, signal } = {}) {
  for (;;) {
    const headers = {};
    const sent = key();
    if (sent) headers.Authorization = `Bearer ${sent}`;
    if (body !== undefined) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(path, { method: body === undefined ? "GET" : "POST", headers, body: body === undefined ? undefined : JSON.stringify(body), signal });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new ApiError("The server does not answer. See whether onym serve is still running, then try again.", 0);
    }
    if (response.ok) return response;
    if (response.status === 401 && (key() !== sent || (await askForKey(sent !== null)))) continue; // another request may have got the key meanwhile
    throw await failure(response);
  }
}

async function failure(response) {
  let sentence = `The server answered ${response.status} ${response.statusText}.`;
  try {
    sentence = (await response.json()).error.message;
  } catch {} // not one of our bodies: a proxy in between
  return new ApiError(sentence, response.status, Number(response.headers.get("Retry-After")) || null);
}

export const json = async (path, options) => (await request(path, options)).json();

/** The server-sent events of a response as `{event, data}`, and `{event: "comment"}` for its signs of life. */
export async function* serverSentEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      buffer += value;
      const blocks = buffer.split("\n\n");
      buffer = blocks.pop();
      for (const block of blocks) yield parsed(block);
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever stops listening ends the request
  }
}

function parsed(block) {
  let event = "message";
  const data = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) event = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
  }
  return data.length ? { event, data: data.join("\n") } : { event: "comment", data: "" };
}

/** The chunks of a streamed answer, as objects; an error in mid-stream is thrown, and so is an end without [DONE]. */
export async function* chunks(path, body, signal) {
  const response = await request(path, { body: { ...body, stream: true, stream_options: { include_usage: true } }, signal });
  try {
    for await (const { data } of serverSentEvents(response)) {
      if (data === "") continue;
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, 500);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ApiError || signal?.aborted) throw error;
    throw new ApiError("The connection broke while the text was written. What came is kept.", 0);
  }
  throw new ApiError("The server ended the text before it was finished. What came is kept.", 0);
}
