"use strict";
// The explorer. State is the history alone; everything shown is asked for anew when it changes.

const byId = (id) => document.getElementById(id);
const chosen = [];
let userId = null; // instead of a history
let asked = 0; // answers to older questions are dropped

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text; // never HTML: titles come from anywhere
  return made;
}

async function ask(path, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const response = await fetch(path, options);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return [answer, response];
}

function shown(error) {
  byId("error").textContent = error ? error.message : "";
  byId("error").hidden = !error;
}

function drawHistory() {
  byId("history").replaceChildren(...chosen.map((item, place) => {
    const line = element("li"), button = element("button", "", `${place + 1}. ${item.title}  ×`);
    button.title = "take it out";
    button.onclick = () => { chosen.splice(place, 1); changed(); };
    line.append(button);
    return line;
  }));
  byId("empty").hidden = chosen.length > 0 || userId !== null;
}

function drawItems(items) {
  const best = Math.max(...items.map((item) => item.score), 1e-9);
  byId("items").replaceChildren(...items.map((item, place) => {
    const line = element("li"), add = element("button", "", item.title), meter = element("meter");
    add.title = "put it into the history";
    add.onclick = () => { userId = null; chosen.push(item); changed(); };
    meter.max = best;
    meter.value = Math.max(0, item.score);
    line.append(element("span", "place", place + 1), add, element("span", "score", item.score.toFixed(4)), meter);
    return line;
  }));
}

function drawTimes(response) {
  const stages = (response.headers.get("Server-Timing") || "").split(", ").filter(Boolean);
  byId("times").tBodies[0].replaceChildren(...stages.map((stage) => {
    const [name, duration] = stage.split(";dur="), row = element("tr");
    row.append(element("td", "", name.replaceAll("_", " ")), element("td", "", `${Number(duration).toFixed(1)} ms`));
    return row;
  }));
}

function drawPicture(points) {
  const order = { item: 0, draw: 1, preference: 2 }; // what matters lies on top
  points.sort((one, other) => order[one.kind] - order[other.kind]);
  byId("picture").replaceChildren(...points.map((point) => {
    const circle = document.createElementNS("http://www.w3.org/2000/svg", "circle");
    const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
    circle.setAttribute("class", point.kind);
    circle.setAttribute("cx", point.x);
    circle.setAttribute("cy", -point.y);
    circle.setAttribute("r", point.kind === "preference" ? 0.045 : 0.025);
    title.textContent = point.title || point.kind;
    circle.append(title);
    return circle;
  }));
}

async function changed() {
  const mine = ++asked;
  drawHistory();
  shown(null);
  if (!chosen.length && userId === null) {
    for (const id of ["items", "picture"]) byId(id).replaceChildren();
    byId("times").tBodies[0].replaceChildren();
    byId("text").hidden = true;
    return;
  }
  const who = userId !== null ? { user_id: userId } : { history: chosen.map((item) => item.item_id) };
  try {
    const [answer, response] = await ask("v1/recommend", { ...who, k: 10, explain: byId("explain").checked });
    if (mine !== asked) return;
    drawItems(answer.items);
    drawTimes(response);
    byId("version").textContent = answer.version;
    byId("text").textContent = answer.text;
    byId("text").hidden = !answer.text;
    const [picture] = await ask("v1/picture", { ...who, k: 40 });
    if (mine === asked) drawPicture(picture.points);
  } catch (error) {
    if (mine === asked) shown(error);
  }
}

let typing;
byId("query").oninput = () => {
  clearTimeout(typing);
  typing = setTimeout(() => find().catch(shown), 150);
};

async function find() {
  const query = byId("query").value.trim();
  const items = query ? (await ask(`v1/items?k=8&query=${encodeURIComponent(query)}`))[0].items : [];
  if (query !== byId("query").value.trim()) return;
  byId("found").replaceChildren(...items.map((item) => {
    const line = element("li"), button = element("button", "", `+ ${item.title}`);
    button.onclick = () => { userId = null; chosen.push(item); changed(); };
    line.append(button);
    return line;
  }));
}

byId("search").onsubmit = (event) => event.preventDefault();
byId("user").onsubmit = (event) => {
  event.preventDefault();
  chosen.length = 0;
  userId = byId("user-id").value.trim() || null;
  changed();
};
byId("explain").onchange = changed;
byId("clear").onclick = () => { chosen.length = 0; userId = null; byId("user-id").value = ""; changed(); };
ask("v1/version").then(([answer]) => { byId("version").textContent = answer.version; }).catch(shown);
