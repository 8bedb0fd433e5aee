// The Write page: a text, one or two models that go on from it, and a chat.
import { json } from "./api.js";
import { Chat } from "./chat.js";
import { asCurl, asPython, showCode } from "./code.js";
import { byId, debounced, sleep, store, stored } from "./elements.js";
import { Pane } from "./pane.js";
import { Sampling } from "./sampling.js";

const STORED = "onym.write";
const EXAMPLE = "Once upon a time, there was a little girl who lived near a forest. One day, she found";

function saveNow() {
  const parts = first.paper.parts.map(({ text, by }) => [text, by]);
  const models = [first, second].map((pane, i) => pane.models.value || wanted[i]); // before the server has answered: what was chosen last time
  if (!store(STORED, { models, compare: byId("compare").checked, chat: view === "chat", parts })) byId("unsaved").hidden = false;
  chat.store();
}
const save = debounced(saveNow, 400);
addEventListener("pagehide", saveNow);

const page = {
  changed() {
    byId("welcome").hidden = first.paper.text !== "" || view === "chat";
    save();
  },
  busy() {
    const busy = working().some((worker) => worker.busy);
    byId("write").disabled = busy || !ready;
    byId("stop-writing").disabled = !busy;
    byId("retry").disabled = busy || !ready || !(view === "chat" ? chat.retryable : first.base);
    byId("undo").disabled = view === "chat" ? !chat.undoable : !first.paper.history.past.length;
    byId("announce").textContent = busy ? "Writing." : begun ? "Writing has ended." : "";
    begun ||= busy;
    save();
  },
  failed(error, again) {
    const busyServer = error.status === 429 || error.status === 503;
    const later = error.retryAfter ? ` Try again in ${error.retryAfter} seconds.` : "";
    const sentence = error.status === undefined ? `The page failed: ${error.message}` : error.message;
    byId("error-text").textContent = busyServer ? `${error.status === 429 ? "The server is busy." : "The server is not ready."} ${sentence}${sentence.includes("again") ? "" : later}` : sentence;
    byId("again").onclick = () => {
      clearError();
      again();
    };
    byId("error").hidden = false;
  },
  chose() {
    showViews();
    save();
  },
};

let ready = false;
let begun = false;
let view = "text";
page.sampling = new Sampling(byId("controls"));
const first = new Pane(page, "");
const second = new Pane(page, "to compare");
const saved = stored(STORED, {});
const wanted = [new URLSearchParams(location.search).get("model") ?? saved.models?.[0], saved.models?.[1]];
const chat = new Chat(page, first);
byId("panes").append(first.node, second.node);
first.paper.sheet.append(byId("welcome")); // on the empty sheet, below the place where one types
byId("settings").open = innerWidth > 960; // on a phone they are below the text, and folded
byId("compare").checked = saved.compare ?? false;
first.paper.show((saved.parts ?? []).map(([text, by]) => ({ text, by, token: null })));

/** What a button acts on: the chat, or the panes that are shown. */
function working() {
  if (view === "chat") return [chat];
  return byId("compare").checked ? [first, second] : [first];
}

function clearError() {
  byId("error").hidden = true;
}

async function write() {
  if (!ready || working().some((worker) => worker.busy)) return;
  await begin((worker) => (view === "chat" ? worker.write() : worker.write(first.paper.parts)));
}

async function retry() {
  if (byId("retry").disabled) return;
  await begin((worker) => (view === "chat" ? worker.retry() : worker.write(first.base)));
}

/** Compared panes begin with the first one's text, and with the same seed. */
async function begin(work) {
  clearError();
  page.sampling.renewSeed();
  await Promise.all(working().map(work));
}

async function stop() {
  await Promise.all(working().map((worker) => worker.stop()));
}

async function undo() {
  await stop();
  for (const worker of working()) worker.undo ? worker.undo() : worker.paper.undo();
  page.busy();
}

function showCompare() {
  second.node.hidden = !byId("compare").checked;
  byId("panes").classList.toggle("two", byId("compare").checked);
  page.busy();
}

/** The chat is offered where the model has a chat template. */
function showViews() {
  const able = first.models.chosen?.chat === true;
  byId("views").hidden = !able;
  setView(able ? view : "text");
}

function setView(name) {
  view = name;
  for (const [id, chosen] of [["view-text", name === "text"], ["view-chat", name === "chat"]]) byId(id).setAttribute("aria-pressed", String(chosen));
  byId("chat").hidden = name !== "chat";
  first.paper.node.hidden = name === "chat";
  first.status.hidden = name === "chat";
  second.node.hidden = name === "chat" || !byId("compare").checked;
  byId("compare-label").hidden = name === "chat";
  byId("panes").classList.toggle("chatting", name === "chat");
  byId("write").firstChild.textContent = name === "chat" ? "Send " : "Write ";
  page.changed();
  page.busy();
}

function code(title, as) {
  if (view === "chat") showCode(title, as("/v1/chat/completions", chat.request()));
  else {
    const { logprobs, return_token_ids, ...body } = first.request(first.paper.text); // what only this page needs is not shown
    showCode(title, as("/v1/completions", body));
  }
}

byId("write").addEventListener("click", write);
byId("stop-writing").addEventListener("click", stop);
byId("retry").addEventListener("click", retry);
byId("undo").addEventListener("click", undo);
byId("clear").addEventListener("click", async () => {
  await stop();
  first.paper.save();
  first.paper.show([]);
  first.paper.area.focus();
});
byId("compare").addEventListener("change", showCompare);
byId("view-text").addEventListener("click", () => setView("text"));
byId("view-chat").addEventListener("click", () => setView("chat"));
byId("curl").addEventListener("click", () => code("The request with curl", asCurl));
byId("python").addEventListener("click", () => code("The request in Python", asPython));
byId("close-code").addEventListener("click", () => byId("code-dialog").close());
byId("dismiss").addEventListener("click", clearError);
byId("example").addEventListener("click", () => {
  first.paper.show([{ text: EXAMPLE, by: "you", token: null }]);
  write();
});
document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    if (event.shiftKey) retry();
    else write();
  } else if (event.key === "Escape" && working().some((worker) => worker.busy)) stop();
});

/** The names of the runs that are shown; null where the server shows none. */
async function namesOfRuns() {
  try {
    return new Set((await json("/api/runs")).runs.map((run) => run.name));
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}

/** Waits until the server is ready, then offers its models. */
async function connect() {
  for (;;) {
    const status = await fetch("/ready").then((response) => response.status, () => 0);
    byId("loading").hidden = status === 200;
    byId("loading").textContent = status === 0 ? "Not connected: the server does not answer. The page tries again." : "The server is loading the model…";
    if (status === 200) break;
    await sleep(1000);
  }
  try {
    const [{ data }, runs] = await Promise.all([json("/v1/models"), namesOfRuns()]);
    byId("runs-link").hidden = runs === null;
    await Promise.all([first.models.offer(data, runs, wanted[0]), second.models.offer(data, runs, wanted[1] ?? wanted[0])]);
    ready = true;
    clearError();
  } catch (error) {
    page.failed(error, connect);
  }
  if (ready && saved.chat) view = "chat";
  showViews();
}

showCompare();
connect();
