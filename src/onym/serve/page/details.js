// One run's own details: what it is, its samples by step, its saved steps, its options.
import { hasKey, json, request } from "./api.js";
import { byId, el, setText } from "./elements.js";
import { bytes, compact, count, duration, loss, moment } from "./format.js";

export class Details {
  constructor(failed) {
    this.failed = failed;
    this.name = null;
    this.slider = byId("sample-step");
    this.slider.addEventListener("input", () => this.#showSample());
    byId("csv").addEventListener("click", (event) => {
      if (!hasKey()) return; // the browser loads it itself, however long it is
      event.preventDefault();
      this.#download(`${this.name}.csv`).catch(failed);
    });
  }

  get path() {
    return `/api/runs/${encodeURIComponent(this.name)}`;
  }

  /** Opens a run, or closes (null). */
  open(run, canWrite) {
    this.name = run?.name ?? null;
    if (!run) return;
    this.canWrite = canWrite;
    this.texts = new Map();
    this.samples = [];
    byId("csv").href = `${this.path}/metrics.csv`;
    this.update(run);
    this.load();
  }

  async #download(name) {
    const href = URL.createObjectURL(await (await request(`${this.path}/metrics.csv`)).blob());
    el("a", { href, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(href), 60_000);
  }

  /** The figures at the top. */
  update(run) {
    setText(byId("run-name"), run.name);
    const facts = [
      ["State", run.status],
      ["Step", run.steps ? `${count(run.step)} of ${count(run.steps)}` : count(run.step)],
      ["ETA", run.eta_seconds === null ? null : duration(run.eta_seconds)],
      ["Training loss", loss(run.train_loss)],
      ["Held-out loss", loss(run.held_out)],
      ["Best", run.best === null ? null : `${loss(run.best)} at step ${count(run.best_step)}`],
      ["Tokens/s", compact(run.tokens_per_second)],
      ["Tokens", compact(run.tokens)],
      ["Time", duration(run.seconds)],
      ["Parameters", compact(run.parameters)],
      ["Saved", moment(run.saved)],
    ].filter(([, text]) => text !== null);
    const list = byId("run-facts");
    if (list.children.length !== facts.length) list.replaceChildren(...facts.map(() => el("div", {}, el("dt"), el("dd"))));
    for (const [i, [name, text]] of facts.entries()) {
      setText(list.children[i].firstChild, name);
      setText(list.children[i].lastChild, text);
    }
  }

  /** What is fetched once a run is opened, and again when it has saved a step. */
  async load() {
    const { name, path } = this;
    const part = async (work) => {
      try {
        await work();
      } catch (error) {
        if (this.name === name) this.failed(error);
      }
    };
    await Promise.all([
      part(async () => {
        const { samples } = await json(`${path}/samples`);
        if (this.name === name) await this.#offerSamples(samples);
      }),
      part(async () => {
        const { checkpoints } = await json(`${path}/checkpoints`);
        if (this.name === name) this.#showCheckpoints(checkpoints);
      }),
      part(async () => {
        const { options, facts } = await json(`${path}/options`);
        if (this.name === name) this.#showOptions({ ...facts, ...options });
      }),
    ]);
  }

  async #offerSamples(samples) {
    const atEnd = Number(this.slider.value) >= this.samples.length - 1;
    this.samples = samples.map((sample) => sample.step).sort((a, b) => a - b);
    byId("samples-none").hidden = this.samples.length > 0;
    byId("samples-some").hidden = this.samples.length === 0;
    this.slider.max = Math.max(0, this.samples.length - 1);
    if (atEnd) this.slider.value = this.slider.max;
    if (this.samples.length) await this.#showSample();
  }

  async #showSample() {
    const { name, path } = this;
    const step = this.samples[Number(this.slider.value)];
    const said = `step ${count(step)}`;
    setText(byId("sample-at"), said);
    this.slider.setAttribute("aria-valuetext", said);
    try {
      if (!this.texts.has(step)) this.texts.set(step, (await json(`${path}/samples/${step}`)).text);
    } catch (error) {
      this.failed(error);
    }
    if (this.name === name && this.samples[Number(this.slider.value)] === step) setText(byId("sample-text"), this.texts.get(step) ?? "");
  }

  #showCheckpoints(checkpoints) {
    byId("checkpoints-none").hidden = checkpoints.length > 0;
    byId("checkpoints-some").hidden = checkpoints.length === 0;
    byId("checkpoints-body").replaceChildren(
      ...checkpoints.map((checkpoint) => {
        const { step, identity, saved, pinned, val_loss, verified } = checkpoint;
        const check = el("td", {});
        this.#showVerified(check, step, verified);
        const name = `${this.name}@${step}`;
        return el(
          "tr",
          {},
          el("th", { scope: "row", className: "number" }, count(step), ...pinned.map((tag) => el("span", { className: "tag" }, tag))),
          el("td", { className: "number" }, loss(val_loss)),
          el("td", { className: "number" }, bytes(checkpoint.bytes)),
          el("td", { className: "number" }, moment(saved)),
          el("td", {}, el("code", { title: identity ?? "" }, identity?.slice(0, 12) ?? "–")),
          check,
          el("td", { hidden: !this.canWrite }, el("a", { href: `/?model=${encodeURIComponent(name)}`, "aria-label": `Write with step ${step}` }, "Write with this step")),
        );
      }),
    );
    byId("write-head").hidden = !this.canWrite;
  }

  #showVerified(cell, step, verified, reason) {
    const again = el("button", { type: "button", className: "quiet", "aria-label": `Verify step ${step}`, onclick: () => this.#verify(cell, step, again) }, "Verify");
    if (verified === true) cell.replaceChildren(el("span", { className: "good" }, "verified"));
    else if (verified === false) cell.replaceChildren(el("span", { className: "bad" }, reason ?? "damaged"), " ", again);
    else cell.replaceChildren(again);
  }

  async #verify(cell, step, button) {
    button.disabled = true;
    button.textContent = "Verifying…";
    cell.setAttribute("aria-live", "polite");
    try {
      const { verified, reason } = await json(`${this.path}/checkpoints/${step}/verify`, { body: {} });
      this.#showVerified(cell, step, verified, reason);
    } catch (error) {
      this.#showVerified(cell, step, null);
      this.failed(error);
    }
  }

  #showOptions(options) {
    const shown = (item) => (typeof item === "string" ? item : JSON.stringify(item));
    byId("options").replaceChildren(...Object.entries(options).map(([name, item]) => el("div", {}, el("dt", {}, name), el("dd", {}, shown(item)))));
  }
}
