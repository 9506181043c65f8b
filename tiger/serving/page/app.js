// The page of the service. All text from users and the catalog goes into text nodes, never into markup.
"use strict";

const $ = (id) => document.getElementById(id);
const TOKEN = "tiger-token";
const state = { history: [], model: null, status: null, prefix: [], item: null, failed: null };

// --- requests ----------------------------------------------------------------------------------------------------

class Refused extends Error {
  constructor(status, reason) {
    super(reason);
    this.status = status;
  }
}

async function ask(path, body) {
  const headers = {};
  const token = sessionStorage.getItem(TOKEN);
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body === undefined ? "GET" : "POST", headers, body: body && JSON.stringify(body) });
  } catch {
    throw new Refused(0, "The service does not answer. Is it running?");
  }
  const text = await response.text();
  let content = {};
  try {
    content = JSON.parse(text);
  } catch {
    content = { detail: text };
  }
  if (response.ok) return content;
  if (response.status === 429) throw new Refused(429, "The service is busy. Try again in a moment.");
  const detail = Array.isArray(content.detail)
    ? content.detail.map((each) => `${each.loc.slice(1).join(".")}: ${each.msg}`).join("; ")
    : content.detail;
  throw new Refused(response.status, detail || `The service answered ${response.status}.`);
}

function show(error) {
  const needsToken = error instanceof Refused && error.status === 401;
  if (needsToken) {
    const had = sessionStorage.getItem(TOKEN);
    sessionStorage.removeItem(TOKEN);
    $("token-form").hidden = false;
    $("main").hidden = true;
    $("token-change").hidden = true;
    if (had) $("token-form").querySelector("h2").textContent = "The service does not accept this token";
    $("token").focus();
    return;
  }
  $("error").textContent = error.message;
  $("error").hidden = false;
}

// Reports an error of an action until the same action succeeds; others leave the message alone. Where calls overlap,
// only the last one counts: an earlier call shows no error and hides none, whenever its answer comes. The action gets a
// function that tells whether it is still the last one, to ask before it draws.
function attempt(action) {
  let calls = 0;
  return async (...given) => {
    const call = ++calls;
    const latest = () => call === calls;
    try {
      await action(latest, ...given);
      if (latest() && state.failed === action) $("error").hidden = true;
    } catch (error) {
      if (!latest()) return;
      state.failed = action;
      show(error);
    }
  };
}

// --- elements ----------------------------------------------------------------------------------------------------

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function idButton(id) {
  return make("button", {
    class: "code", type: "button", title: "Browse this prefix", "aria-label": `Semantic ID ${id.join(", ")}: browse its prefix`,
    onclick: () => { closeItem(); browseTo(id); },
  }, id.join(" "));
}

function itemRow(item, { rank = null, facts = [], action = null }) {
  const title = make("button", { class: "open", type: "button", onclick: () => openItem(item.item) }, item.title);
  const line = make("span", { class: "facts" }, ...facts, item.semantic_id ? idButton(item.semantic_id) : null);
  return make("li", {},
    rank === null ? null : make("span", { class: "rank", "aria-hidden": "true" }, String(rank)),
    make("div", { class: "what" }, title, line), action);
}

function button(label, name, onclick) {
  return make("button", { type: "button", class: "quiet act", "aria-label": name, onclick }, label);
}

function counted(items) {
  return `${items.toLocaleString("en")} ${items === 1 ? "item" : "items"}`;
}

function percent(score) {
  const value = 100 * Math.exp(score);
  return value >= 0.1 ? `${value.toFixed(1)} %` : "< 0.1 %";
}

function meter(score) {
  const space = "http://www.w3.org/2000/svg";
  const drawing = document.createElementNS(space, "svg");
  drawing.setAttribute("class", "meter");
  drawing.setAttribute("aria-hidden", "true");
  const bar = document.createElementNS(space, "rect");
  bar.setAttribute("width", `${Math.max(100 * Math.exp(score), 1)}%`);
  bar.setAttribute("height", "100%");
  drawing.append(bar);
  return drawing;
}

// --- history -----------------------------------------------------------------------------------------------------

const search = attempt(async (latest) => {
  const query = $("query").value.trim();
  if (!query) {
    $("found").replaceChildren();
    $("found-note").textContent = "";
    return;
  }
  const { items } = await ask(`search?limit=8&q=${encodeURIComponent(query)}`);
  if (!latest()) return;
  $("found-note").textContent = items.length ? `${items.length === 8 ? "The first 8" : items.length} found` : "No title has these words.";
  $("found").replaceChildren(...items.map((item) => itemRow(item, {
    facts: [make("span", {}, item.item)],
    action: button("Add", `Add ${item.title} to the history`, () => add(item)),
  })));
});

function add(item) {
  state.history.push({ item: item.item, title: item.title, semantic_id: item.semantic_id });
  historyChanged();
}

function historyChanged() {
  $("chosen").replaceChildren(...state.history.map((item, position) => itemRow(item, {
    rank: position + 1,
    action: button("Remove", `Remove ${item.title} from the history`, () => {
      state.history.splice(position, 1);
      historyChanged();
      ($("chosen").querySelectorAll(".act")[Math.min(position, state.history.length - 1)] || $("query")).focus();
    }),
  })));
  $("chosen-empty").hidden = state.history.length > 0;
  $("clear").hidden = state.history.length === 0;
  recommend();
}

// --- recommendations ---------------------------------------------------------------------------------------------

function request() {
  const given = new FormData($("options"));
  const number = (name) => (given.get(name) ? Number(given.get(name)) : null);
  const filters = { min_price: number("min_price"), max_price: number("max_price"), only_new: given.has("only_new") };
  filters.category = (given.get("category") || "").trim() || null;
  const body = { history: state.history.map((item) => item.item), k: number("k") || 10, filters, explain: true };
  body.temperature = number("temperature");
  body.max_per_first_code = number("max_per_first_code");
  body.user = (given.get("user") || "").trim() || null;
  if (state.status && state.status.needs_users && body.user === null) body.user = "";
  if (given.has("include_seen")) body.exclude_seen = false;
  return body;
}

const recommend = attempt(async (latest) => {
  const answer = await ask("recommend", request());
  if (!latest()) return;
  const notes = [];
  if (answer.by_popularity) notes.push("The most popular items, the same for everyone without a known history.");
  if (!answer.items.length) notes.push("No item passes the filters.");
  if (answer.ignored.length) notes.push(`Not in the catalog: ${answer.ignored.join(", ")}`);
  $("results-note").textContent = notes.join(" ");
  $("results").replaceChildren(...answer.items.map((item, position) => itemRow(item, {
    rank: position + 1,
    facts: [
      answer.by_popularity ? null : make("span", {}, percent(item.score)),
      make("span", {}, `score ${item.score.toFixed(2)}`),
      make("span", {}, item.item),
    ].filter(Boolean),
    action: button("Add", `Add ${item.title} to the history`, () => add(item)),
  })));
  showBeam(answer);
  if (answer.model !== state.model) await refreshStatus();
});

function showBeam(answer) {
  const levels = answer.beam || [];
  $("beam-part").hidden = !levels.length;
  if (!levels.length) return;
  const titles = new Map(answer.items.map((item) => [item.semantic_id.join(), item]));
  const branch = (parent) => {
    const level = levels[parent.length] || [];
    const below = level.filter((each) => each.recommended && parent.every((code, index) => each.prefix[index] === code));
    if (!below.length) return null;
    return make("ul", {}, ...below.map((each) => {
      const item = titles.get(each.prefix.join());
      const about = item
        ? make("button", { class: "open", type: "button", onclick: () => openItem(item.item) }, item.title)
        : make("span", { class: "words" }, each.words.join(", "));
      const code = make("button", {
        class: "code", type: "button", "aria-label": `Prefix ${each.prefix.join(", ")}: browse`,
        onclick: () => (item ? browseTo(each.prefix) : browse(each.prefix, { jump: true })),
      }, String(each.prefix[each.prefix.length - 1]));
      const line = make("div", { class: "line" }, code, make("span", { class: "percent" }, percent(each.score)),
        meter(each.score), make("div", { class: "about" }, about));
      return make("li", {}, line, branch(each.prefix));
    }));
  };
  $("beam").replaceChildren(branch([]) || "");
  const kept = levels.map((level) => level.length).join(", ");
  $("beam-note").textContent = `The beam kept ${kept} prefixes at its levels; the others lead to no recommended item.`;
}

// --- one item ----------------------------------------------------------------------------------------------------

const openItem = attempt(async (latest, id) => {
  const item = await ask(`items/${encodeURIComponent(id)}?neighbors=8`);
  if (!latest()) return;
  state.item = item;
  $("item-title").textContent = item.title;
  const facts = [["Item id", item.item], ["Seen in training", item.seen_in_training ? `${item.seen_in_training} times` : "never: a new item"]];
  if (item.semantic_id) facts.splice(1, 0, ["Semantic ID", item.semantic_id.join(" ")]);
  if (item.price !== null) facts.push(["Price", String(item.price)]);
  if (item.categories.length) facts.push(["Categories", item.categories.join(" › ")]);
  $("item-facts").replaceChildren(...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  $("item-browse").hidden = !item.semantic_id;
  $("item-near").hidden = !item.neighbors.length;
  $("neighbors").replaceChildren(...item.neighbors.map((near) => itemRow(near, {
    facts: [make("span", {}, `${near.shared_codes} common ${near.shared_codes === 1 ? "code" : "codes"}`)],
  })));
  if (!$("item").open) $("item").showModal();
  $("item").scrollTop = 0;
});

function closeItem() {
  if ($("item").open) $("item").close();
}

// --- prefixes ----------------------------------------------------------------------------------------------------

// The longest prefix of an ID that other items have too.
const browseTo = attempt(async (latest, id) => {
  let prefix = id.slice(0, -1);
  while (prefix.length > 1 && (await ask(`prefix?limit=1&codes=${prefix.join(",")}`)).num_items === 1) prefix = prefix.slice(0, -1);
  if (latest()) await browse(prefix, { jump: true });
});

const browse = attempt(async (latest, prefix, { jump = false, limit = 24 } = {}) => {
  const found = await ask(`prefix?limit=${limit}&codes=${prefix.join(",")}`);
  if (!latest()) return;
  state.prefix = found.prefix;
  const crumb = (codes, label) => make("li", {}, codes.length === prefix.length
    ? make("span", { class: "code", "aria-current": "location" }, label)
    : make("button", { class: "code", type: "button", onclick: () => browse(codes, { jump: true }) }, label));
  $("crumbs").replaceChildren(crumb([], "all"), ...prefix.map((code, index) => crumb(prefix.slice(0, index + 1), String(code))));
  const count = counted(found.num_items);
  const parts = found.num_children > 1 || !found.items.length ? `, ${found.num_children} next codes` : "";
  const shown = found.children.length < found.num_children ? `, the ${found.children.length} largest shown` : "";
  $("prefix-more").hidden = !shown || limit >= 1000;
  $("prefix-more").textContent = `Show ${found.num_children <= 1000 ? "all" : "1,000 of"} ${found.num_children}`;
  $("prefix-more").onclick = () => browse(found.prefix, { limit: 1000 });
  $("prefix-note").textContent = count + parts + shown + (found.words.length ? `: ${found.words.join(", ")}` : "");
  const whole = found.items.length > 0;
  $("prefixes").hidden = whole;
  $("prefixes").replaceChildren(...(whole ? [] : found.children.map((child) => make("li", {}, make("button", {
    type: "button", onclick: () => browse([...found.prefix, child.code], { jump: true }),
    "aria-label": `Code ${child.code}, ${counted(child.num_items)}: ${child.words.join(", ") || child.example}`,
  }, make("span", { class: "code" }, String(child.code)), [` ${counted(child.num_items)}`, ...(child.words.length ? [child.words.join(", ")] : [])].join(" · "),
  make("span", { class: "example" }, child.example))))));
  $("prefix-items").replaceChildren(...found.items.map((item) => itemRow(item, {
    action: button("Add", `Add ${item.title} to the history`, () => add(item)),
  })));
  if (jump) {
    $("tree-part").scrollIntoView({ block: "start" });
    $("tree-title").setAttribute("tabindex", "-1");
    $("tree-title").focus({ preventScroll: true });
  }
});

// --- status ------------------------------------------------------------------------------------------------------

async function refreshStatus() {
  const failed = (error) => (error.status === 503 ? { status: "failed", detail: error.message } : Promise.reject(error));
  const [status, health] = await Promise.all([ask("status"), ask("healthz").catch(failed)]);
  state.status = status;
  state.model = status.model;
  const parts = [`${status.model}`, `${status.num_items.toLocaleString("en")} items`];
  const changed = status.swap && [status.swap.model, status.swap.semantic_ids].filter(Boolean).join(" with ");
  if (status.swap && status.swap.state === "loading") parts.push(`loading ${changed}`);
  if (status.swap && status.swap.state === "refused") parts.push(`refused ${changed}: ${status.swap.reason}`);
  const word = health.status === "ok" ? "healthy" : `failed: ${health.detail}`;
  if ($("status").textContent !== [word, ...parts].join(" · ")) {  // screen readers read each change
    $("status").replaceChildren(make("span", { class: health.status }, word), ` · ${parts.join(" · ")}`);
  }
  for (const part of document.querySelectorAll("[data-needs]")) part.hidden = !status[part.dataset.needs];
  $("options").elements.max_per_first_code.closest("label").hidden = !status.has_semantic_ids;
  $("options").elements.k.max = status.beam;
  $("tree-part").hidden = !status.has_semantic_ids;
}

const begin = attempt(async (latest) => {
  await refreshStatus();  // fails without a token
  if (!latest()) return;
  $("token-form").hidden = true;
  $("main").hidden = false;
  $("token-change").hidden = !sessionStorage.getItem(TOKEN);
  historyChanged();
  if (state.status && state.status.has_semantic_ids) await browse([]);
});

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, $("token").value.trim());
  $("token").value = "";
  begin();
});
$("token-change").addEventListener("click", () => {
  sessionStorage.removeItem(TOKEN);
  begin();
});
let typing = null;
$("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  clearTimeout(typing);
  search();
});
$("query").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(search, 200);
});
$("options").addEventListener("submit", (event) => {
  event.preventDefault();
  recommend();
});
$("clear").addEventListener("click", () => {
  state.history = [];
  historyChanged();
  $("query").focus();
});
$("item-close").addEventListener("click", closeItem);
$("item-add").addEventListener("click", () => {
  add(state.item);
  closeItem();
});
$("item-browse").addEventListener("click", () => {
  closeItem();
  browseTo(state.item.semantic_id);
});
setInterval(() => refreshStatus().catch((error) => {
  if (!$("main").hidden) $("status").replaceChildren(make("span", { class: "failed" }, error.message));
}), 15000);
begin();
