// The current request as a line of curl and as Python, to copy.
import { byId } from "./elements.js";

const KEY = "YOUR_API_KEY";
const OWN = ["top_k", "min_p", "repetition_penalty", "slide"]; // fields that the openai package has no arguments for

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function asCurl(path, body) {
  return [`curl ${location.origin}${path} \\`, `  -H "Authorization: Bearer ${KEY}" \\`, `  -H "Content-Type: application/json" \\`, `  -d ${quoted(JSON.stringify(body, null, 2))}`].join("\n");
}

/** A JSON value as a Python literal. JSON's strings are Python's, too. */
function literal(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${literal(item)}`).join(", ")}}`;
  return JSON.stringify(value);
}

export function asPython(path, body) {
  const chat = path.includes("chat");
  const fields = Object.entries(body).filter(([name]) => !OWN.includes(name));
  const own = Object.fromEntries(Object.entries(body).filter(([name]) => OWN.includes(name)));
  const lines = [...fields.map(([name, value]) => `    ${name}=${literal(value)},`), `    extra_body=${literal(own)},`];
  return `from openai import OpenAI  # pip install openai

client = OpenAI(base_url="${location.origin}/v1", api_key="${KEY}")
stream = client.${chat ? "chat.completions" : "completions"}.create(
${lines.join("\n")}
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].${chat ? 'delta.content or ""' : "text"}, end="", flush=True)
`;
}

/** Shows code in the page's dialog, where it can be copied: with the button, or by hand where the browser forbids it. */
export function showCode(title, code) {
  byId("code-title").textContent = title;
  byId("code").textContent = code;
  byId("copy").textContent = "Copy";
  byId("copy").onclick = async () => {
    try {
      await navigator.clipboard.writeText(code);
      byId("copy").textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(byId("code"));
      byId("copy").textContent = "Selected: press Ctrl+C";
    }
  };
  byId("code-dialog").showModal();
}
