// Which models there are, and the chooser of a model and, where it belongs to a run, of one of the run's saved steps.
import { json } from "./api.js";
import { el } from "./elements.js";
import { compact, count } from "./format.js";

/** A select of models and one of steps. `value` is the model id of a request: NAME, or RUN@STEP. */
export class ModelChooser {
  constructor(label, changed) {
    this.changed = changed;
    this.model = el("select", { "aria-label": label });
    this.step = el("select", { "aria-label": `${label}: step`, hidden: true });
    this.about = el("span", { className: "about" });
    this.node = el("div", { className: "chooser" }, this.model, this.step, this.about);
    this.model.addEventListener("change", () => this.#showSteps().then(changed));
    this.step.addEventListener("change", () => {
      this.#describe();
      changed();
    });
  }

  get value() {
    return this.step.hidden || this.step.value === "" ? this.model.value : `${this.#entry().run}@${this.step.value}`;
  }

  /** What is known of the chosen model: {id, run, chat, max_model_len, …}. */
  get chosen() {
    return this.#entry();
  }

  #entry() {
    return this.entries?.[this.model.selectedIndex];
  }

  /** Offers `models`, with the steps of those that belong to one of `runs` (names, or null), and chooses `wanted` (NAME, or RUN@STEP) where it is among them. */
  async offer(models, runs, wanted) {
    this.entries = models.map((entry) => ({ ...entry, run: runs?.has(entry.run) ? entry.run : null }));
    this.model.replaceChildren(...models.map((entry) => el("option", {}, entry.id)));
    const [name, step] = wanted?.match(/^(.*)@(\d+)$/)?.slice(1) ?? [wanted, ""];
    const exact = models.findIndex((entry) => entry.id === wanted);
    const index = exact >= 0 ? exact : this.entries.findIndex((entry) => entry.id === name || entry.run === name);
    this.model.selectedIndex = Math.max(0, index);
    await this.#showSteps(index >= 0 ? step : "");
  }

  async #showSteps(wanted = "") {
    const entry = this.#entry();
    let steps = [];
    if (entry?.run) {
      try {
        steps = (await json(`/api/runs/${encodeURIComponent(entry.run)}/checkpoints`)).checkpoints.map((checkpoint) => String(checkpoint.step));
      } catch {} // without its steps the model can still be written with
    }
    if (entry !== this.#entry()) return; // another model was chosen meanwhile
    const options = steps.map((step) => el("option", { value: step }, `step ${count(Number(step))}`));
    this.step.replaceChildren(el("option", { value: "" }, "newest step"), ...options);
    this.step.hidden = steps.length === 0;
    if (steps.includes(wanted)) this.step.value = wanted;
    this.#describe();
  }

  #describe() {
    const entry = this.#entry();
    if (!entry) return;
    const facts = [];
    if (entry.parameters) facts.push(`${compact(entry.parameters)} parameters`);
    if (entry.max_model_len) facts.push(`context ${count(entry.max_model_len)} tokens`);
    if (entry.step !== null && entry.step !== undefined && !this.step.value) facts.push(`step ${count(entry.step)}`);
    if (entry.loaded === false) facts.push("loaded when first used");
    this.about.textContent = facts.join(" · ");
  }
}
