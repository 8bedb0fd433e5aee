// What happens in the runs, as the server reports it; with the connection kept up, and its loss said plainly.
import { ApiError, request, serverSentEvents } from "./api.js";
import { byId } from "./elements.js";

const SILENCE = 40_000; // milliseconds; the server sends a comment every 15 s
const LONGEST_WAIT = 15; // seconds between two tries

export class Live {
  /** `connected()` is called after each connection was made, `handle(event, data)` for each event. */
  constructor(connected, handle) {
    this.connected = connected;
    this.handle = handle;
    this.watched = [];
    byId("reconnect").addEventListener("click", () => this.wake?.());
  }

  /** Asks for news of the metrics of these runs, too. */
  watch(names) {
    if (this.begun && names.join() === this.watched.join()) return;
    this.watched = names;
    if (this.begun) this.abort?.abort();
    else this.#run();
  }

  async #run() {
    this.begun = true;
    let failures = 0;
    for (;;) {
      const watched = this.watched;
      this.abort = new AbortController();
      try {
        const query = new URLSearchParams(watched.map((name) => ["metrics", name])); // once for each run: names may hold commas
        const response = await request(`/api/events?${query}`, { signal: this.abort.signal });
        byId("offline").hidden = true;
        if (failures) await this.connected();
        failures = 0;
        await this.#listen(response);
      } catch (error) {
        if (error instanceof ApiError && error.status >= 400 && error.status < 500 && error.status !== 429) {
          byId("offline-text").textContent = error.message;
          byId("offline").hidden = false;
          return;
        }
      }
      if (this.watched !== watched) continue; // other runs are drawn now: asked anew at once
      failures += 1;
      await this.#wait(Math.min(LONGEST_WAIT, 2 ** (failures - 1)));
    }
  }

  async #listen(response) {
    let timer = 0;
    const alive = () => {
      clearTimeout(timer);
      timer = setTimeout(() => this.abort.abort(), SILENCE);
    };
    alive();
    try {
      for await (const { event, data } of serverSentEvents(response)) {
        alive();
        if (event !== "comment") this.handle(event, JSON.parse(data));
      }
    } finally {
      clearTimeout(timer);
    }
  }

  #wait(seconds) {
    byId("offline-text").textContent = `Not connected: the server does not answer. What is shown may be old. The page tries again in ${seconds} s.`;
    byId("offline").hidden = false;
    return new Promise((resolve) => {
      this.wake = resolve;
      setTimeout(resolve, 1000 * seconds);
    });
  }
}
