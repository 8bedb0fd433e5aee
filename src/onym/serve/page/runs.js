// The Runs page: a table of the runs, charts of those that are chosen, and one run's details.
import { json } from "./api.js";
import { Charts } from "./charts.js";
import { Details } from "./details.js";
import { byId, debounced, sleep, store, stored } from "./elements.js";
import { Live } from "./live.js";
import { RunTable } from "./runtable.js";

const STORED = "onym.runs";
const COLORS = 10;
const DRAWN_AT_FIRST = 5;
const DRAWN_AT_MOST = 20;
const POINTS = 1500;
const FETCH_EVERY = 1000; // milliseconds between two fetches of one run's metrics while it goes on

const settings = { x: "step", logX: false, logY: false, smoothing: 0.8, ...stored(STORED, {}), range: null };
const metrics = new Map(); // name -> what the server sent last, for the axis and range in use
const fetching = new Map(); // name -> {again}: one request a run at a time
let chosenByHand = false; // until then the newest runs are drawn
let writable = false;
let waiting = []; // changed summaries, shown together

function failed(error) {
  byId("error-text").textContent = error.message;
  byId("error").hidden = false;
}

const table = new RunTable((name, chosen) => {
  chosenByHand = true;
  if (chosen) draw([...table.colors.keys(), name]);
  else draw([...table.colors.keys()].filter((other) => other !== name));
});
const charts = new Charts(byId("charts"), zoom);
const details = new Details(failed);
const live = new Live(reload, handle);

/** The run that is open, from the address: #run=NAME. */
function opened() {
  const name = new URLSearchParams(location.hash.slice(1)).get("run");
  return name !== null && table.runs.has(name) ? name : null;
}

const onCharts = () => (opened() !== null ? [opened()] : [...table.colors.keys()]);

/** Chooses which runs are drawn. A run keeps its colour while it is drawn; of more runs than colours some share one. */
function draw(names) {
  byId("too-many").hidden = names.length <= DRAWN_AT_MOST;
  names = names.slice(0, DRAWN_AT_MOST);
  const colors = new Map();
  const used = () => [...colors.values()];
  for (const name of names) if (table.colors.has(name)) colors.set(name, table.colors.get(name));
  for (const name of names) {
    if (colors.has(name)) continue;
    const free = Array.from({ length: COLORS }, (_, i) => `--c${i}`).find((color) => !used().includes(color));
    colors.set(name, free ?? `--c${colors.size % COLORS}`);
  }
  table.colors = colors;
  table.show();
  showCharts();
}

/** Draws what is on the charts, and fetches what is missing. */
function showCharts() {
  const names = onCharts();
  for (const name of metrics.keys()) if (!names.includes(name)) metrics.delete(name);
  for (const name of names) if (!metrics.has(name)) fetchMetrics(name);
  live.watch(names);
  redraw();
}

const paint = () => {
  charts.draw(onCharts().map((name) => ({ name, color: table.colors.get(name) ?? "--c0", metrics: metrics.get(name) })), settings);
  byId("nothing").hidden = onCharts().length > 0;
};
let frame = 0;
function redraw() {
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(paint);
}

/** Fetches a run's curves. What is asked for while a request is under way is fetched once, after it, and at most once a second. */
async function fetchMetrics(name) {
  const under = fetching.get(name);
  if (under) {
    under.again = true;
    return;
  }
  const state = { again: false };
  fetching.set(name, state);
  const query = new URLSearchParams({ x: settings.x, points: POINTS, ...(settings.range ?? {}) });
  try {
    const answer = await json(`/api/runs/${encodeURIComponent(name)}/metrics?${query}`);
    if (onCharts().includes(name) && !state.stale) {
      metrics.set(name, answer);
      redraw();
    }
  } catch (error) {
    if (error.status) failed(error); // a lost connection is said by the live part
  }
  if (!state.stale) await sleep(FETCH_EVERY);
  fetching.delete(name);
  if (state.again && onCharts().includes(name)) fetchMetrics(name);
}

/** Another axis or range: all curves are fetched anew, and what is under way is for the old ones. */
function refetch() {
  for (const state of fetching.values()) state.stale = true;
  fetching.clear();
  for (const name of onCharts()) fetchMetrics(name);
}

function zoom(from, to) {
  settings.range = from === null ? null : { from, to };
  byId("from").value = from === null ? "" : Number(from.toPrecision(6));
  byId("to").value = to === null ? "" : Number(to.toPrecision(6));
  byId("whole").disabled = settings.range === null;
  refetch();
  redraw();
}

const showWaiting = () => {
  const runs = waiting;
  waiting = [];
  for (const run of runs) table.runs.set(run.name, run);
  if (!chosenByHand && runs.some((run) => !table.rows.has(run.name))) drawNewest();
  else table.show();
  const name = opened();
  if (name !== null) details.update(table.runs.get(name));
};

function handle(event, data) {
  if (event === "run") {
    const before = table.runs.get(data.name);
    if (details.name === data.name && before && before.saved !== data.saved) details.load();
    if (!waiting.length) setTimeout(showWaiting, 250);
    waiting.push(data);
  } else if (event === "gone") {
    table.remove(data.name);
    draw([...table.colors.keys()].filter((name) => name !== data.name));
    route();
  } else if (event === "metrics") {
    if (data.reset) {
      metrics.delete(data.run); // the file became shorter: nothing of what was drawn counts
      redraw();
    }
    fetchMetrics(data.run);
  }
}

function drawNewest() {
  const newest = [...table.runs.values()].sort((a, b) => (b.started ?? b.changed) - (a.started ?? a.changed));
  draw(newest.slice(0, DRAWN_AT_FIRST).map((run) => run.name));
}

async function reload() {
  const { folder, runs } = await json("/api/runs");
  byId("folder").textContent = folder ?? "";
  table.runs = new Map(runs.map((run) => [run.name, run]));
  if (!chosenByHand) drawNewest();
  else draw([...table.colors.keys()].filter((name) => table.runs.has(name)));
  refetch();
}

function route() {
  const name = opened();
  if (name === details.name) return;
  byId("overview").hidden = name !== null;
  byId("details").hidden = name === null;
  byId("details-more").hidden = name === null;
  details.open(name === null ? null : table.runs.get(name), writable);
  document.title = `${name ?? "Runs"} · Onym`;
  zoom(null, null);
  showCharts();
  if (name !== null) byId("run-name").focus();
}

function bindSettings() {
  for (const [id, property] of [["x-axis", "value"], ["log-x", "checked"], ["log-y", "checked"], ["smoothing", "valueAsNumber"]]) {
    const key = { "x-axis": "x", "log-x": "logX", "log-y": "logY", smoothing: "smoothing" }[id];
    const control = byId(id);
    if (property === "valueAsNumber") control.value = settings[key];
    else control[property] = settings[key];
    control.addEventListener("input", () => {
      settings[key] = control[property];
      store(STORED, { ...settings, range: undefined });
      byId("smoothing-shown").textContent = settings.smoothing;
      if (key === "x") zoom(null, null);
      else redraw();
    });
  }
  byId("smoothing-shown").textContent = settings.smoothing;
  const ranged = () => {
    const [from, to] = ["from", "to"].map((id) => byId(id).valueAsNumber);
    if (from < to) zoom(from, to);
  };
  for (const id of ["from", "to"]) byId(id).addEventListener("change", ranged);
  byId("whole").addEventListener("click", () => zoom(null, null));
  byId("draw-none").addEventListener("click", () => {
    chosenByHand = true;
    draw([]);
  });
}

bindSettings();
byId("dismiss").addEventListener("click", () => (byId("error").hidden = true));
document.addEventListener("themechange", redraw);
addEventListener("hashchange", route);

for (let seconds = 1; ; seconds = Math.min(15, 2 * seconds)) {
  try {
    await reload();
    break;
  } catch (error) {
    failed(error);
    await sleep(1000 * seconds);
  }
}
byId("error").hidden = true;
json("/v1/models").then(({ data }) => {
  writable = data.length > 0;
  byId("write-link").hidden = !writable;
  route();
}, route);
