// A conversation with a model that has a chat template.
import { chunks } from "./api.js";
import { byId, el, store, stored } from "./elements.js";
import { Meter } from "./meter.js";

const STORED = "onym.chat";
const WHO = { user: "You", assistant: "Model" };

export class Chat {
  constructor(page, pane) {
    this.page = page;
    this.pane = pane;
    this.abort = null;
    this.past = [];
    const saved = stored(STORED, {});
    this.messages = saved.messages ?? [];
    this.list = byId("messages");
    this.system = byId("system");
    this.input = byId("message");
    this.system.value = saved.system ?? "";
    this.input.value = saved.draft ?? "";
    this.meter = new Meter(byId("chat-meter"));
    for (const field of [this.system, this.input]) field.addEventListener("input", () => this.page.changed());
    this.show();
  }

  get busy() {
    return this.abort !== null;
  }

  get undoable() {
    return this.past.length > 0;
  }

  get retryable() {
    return this.messages.some((message) => message.role === "assistant");
  }

  store() {
    return store(STORED, { messages: this.messages, system: this.system.value, draft: this.input.value });
  }

  request() {
    const system = this.system.value.trim() ? [{ role: "system", content: this.system.value }] : [];
    return { model: this.pane.models.value, messages: [...system, ...this.messages], ...this.page.sampling.fields(), slide: true };
  }

  /** Sends what was typed; with nothing typed and a message without a reply, asks for the reply again. */
  async write() {
    const content = this.input.value;
    if (content.trim()) {
      this.#save();
      this.messages = [...this.messages, { role: "user", content }];
      this.input.value = "";
    } else if (this.messages.at(-1)?.role !== "user") return;
    await this.#reply(this.messages);
  }

  async retry() {
    await this.stop();
    this.#save();
    await this.#reply(this.messages.slice(0, this.messages.findLastIndex((message) => message.role === "assistant")));
  }

  async undo() {
    await this.stop();
    const before = this.past.pop();
    if (!before) return;
    this.messages = before.messages;
    this.input.value = before.draft || this.input.value;
    this.show();
    this.page.busy();
  }

  async stop() {
    this.abort?.abort();
    await this.running;
  }

  #save() {
    this.past.push({ messages: this.messages, draft: this.input.value });
  }

  async #reply(asked) {
    const abort = new AbortController();
    this.messages = asked;
    this.abort = abort;
    this.page.busy();
    this.meter.start();
    const body = this.request();
    this.show();
    this.running = this.#stream(body, asked, abort.signal)
      .then(() => this.meter.end())
      .catch((error) => {
        this.meter.end(abort.signal.aborted ? "stopped" : "not finished");
        if (!abort.signal.aborted) this.page.failed(error, () => this.#reply(asked));
      })
      .finally(() => {
        this.abort = null;
        this.page.busy();
        this.input.focus();
      });
    await this.running;
  }

  async #stream(body, asked, signal) {
    let content = "";
    for await (const chunk of chunks("/v1/chat/completions", body, signal)) {
      const delta = chunk.choices[0]?.delta?.content;
      if (!delta) continue;
      this.meter.add(1);
      content += delta;
      this.messages = [...asked, { role: "assistant", content }];
      this.show();
    }
  }

  /** Shows the messages; one element each is kept, so that a streamed reply changes only its own text. */
  show() {
    while (this.list.children.length > this.messages.length) this.list.lastChild.remove();
    for (const [i, { role, content }] of this.messages.entries()) {
      const node = this.list.children[i] ?? this.list.appendChild(el("li", {}, el("p", { className: "who" }), el("p", { className: "content" })));
      node.className = role;
      node.firstChild.textContent = WHO[role] ?? role;
      node.lastChild.textContent = content;
    }
    this.list.scrollTop = this.list.scrollHeight;
    this.page.changed();
  }
}
