/** The server's API. Errors are thrown as Error with a sentence to show; `status` is 0 if the server was not reached. */

const KEY = "isoflop.key";
let askForKey = null;
let asking = null; // one dialog for all requests that wait for the key

export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** ask: async (message) → the key that the user typed, or null. */
export function onMissingKey(ask) {
  askForKey = ask;
}

async function request(method, path, body) {
  for (let refused = ""; ; ) {
    const headers = {};
    const key = sessionStorage.getItem(KEY);
    if (key) headers.authorization = `Bearer ${key}`;
    if (body !== undefined) headers["content-type"] = "application/json";
    let response;
    try {
      response = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
    } catch {
      throw new ApiError("The server cannot be reached; see whether it still runs.");
    }
    if (response.ok) return response;
    const message = await errorOf(response);
    if (response.status !== 401) throw new ApiError(message, response.status);
    if (sessionStorage.getItem(KEY) === key) { // else another request has just stored one
      refused = key ? "That key is wrong." : "";
      asking ??= askForKey(refused).finally(() => (asking = null));
      const given = (await asking)?.trim();
      if (!given) throw new ApiError("The server wants an API key; reload the page to enter it.", 401);
      sessionStorage.setItem(KEY, given);
    }
  }
}

async function errorOf(response) {
  try {
    return sentence((await response.json()).error.message);
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

/** Return a message of the server as a sentence. */
function sentence(message) {
  const text = message.charAt(0).toUpperCase() + message.slice(1);
  return /[.!?]$/.test(text) ? text : `${text}.`;
}

const json = async (method, path, body) => (await request(method, path, body)).json();

/** Yield the events of an answer; an error that the server sends is thrown. */
async function* events(path, body) {
  const response = await request("POST", path, body);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch {
      throw new ApiError("The connection to the server broke; what was written is stored.");
    }
    if (part.done) return;
    const blocks = (rest + part.value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(sentence(event.error.message), event.error.code);
      yield event;
    }
  }
}

const one = (id) => `api/conversations/${id}`;

export const models = () => json("GET", "api/models");
export const list = async (search) =>
  (await json("GET", `api/conversations?search=${encodeURIComponent(search)}`)).conversations;
export const create = (changes) => json("POST", "api/conversations", changes);
export const read = (id) => json("GET", one(id));
export const update = (id, changes) => json("PATCH", one(id), changes);
export const remove = (id) => json("DELETE", one(id));
export const answer = (id, body) => events(`${one(id)}/answer`, body);
export const stop = (id) => json("POST", `${one(id)}/stop`);
export const choose = (id, message) => json("POST", `${one(id)}/branch`, { message });
export const logprobs = (id, message) => json("GET", `${one(id)}/messages/${message}/logprobs`);

/** Return the file of an export as {name, blob}. */
export async function exported(id, format) {
  const response = await request("GET", `${one(id)}/export?format=${format}`);
  const name = /filename="([^"]*)"/.exec(response.headers.get("content-disposition"))[1];
  return { name, blob: await response.blob() };
}
