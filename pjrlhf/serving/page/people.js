// The person picker: who asks, new people, and their removal.

import { Failure, call } from "./api.js";
import { called, changed, known, listen, state } from "./state.js";
import { lasted, plural } from "./weights.js";

const $ = (id) => document.getElementById(id);
export const LEARNING = "Learning from your vote…";
const COMPILING = "The server has just started and still compiles what this needs; it may take half a minute.";
const PATIENCE = 1500; // milliseconds before a reason is asked for
export const place = (id) => `v1/users/${encodeURIComponent(id)}`;

export async function loadPeople() {
  let [people, more] = [[], true];
  while (more) {
    const after = people.length ? `?after=${encodeURIComponent(people.at(-1).id)}` : "";
    const page = await call(`v1/users${after}`);
    people = [...people, ...page.data];
    more = page.has_more === true && page.data.length > 0;
  }
  state.people = people;
}

// A list leaves out weights that have to be fitted first.
export async function loadWeights(id) {
  if (state.server.mixing && known(id)?.mix === null) learned(await call(place(id)));
}

// Puts a person's new state in the place of the old one.
export function learned(person) {
  const at = state.people.findIndex((other) => other.id === person.id);
  if (at < 0) state.people.push(person);
  else state.people[at] = person;
}

// Runs an action. Where it takes long because the server still compiles, the element `note` says so until it ends.
export async function patiently(note, action) {
  const said = note.textContent;
  const told = `${said} ${COMPILING}`.trim();
  let over = false;
  const timer = setTimeout(async () => {
    const health = await call("health").catch(() => null);
    if (health?.compiling && !over && note.textContent === said) note.textContent = told;
  }, PATIENCE);
  try {
    return await action();
  } finally {
    over = true;
    clearTimeout(timer);
    if (note.textContent === told) note.textContent = said;
  }
}

// Teaches the person who asks; tells what was learned.
export async function teach(comparisons) {
  const began = performance.now();
  const id = state.person;
  const person = await call(`${place(id)}/feedback`, "POST", { comparisons });
  learned(person);
  if (state.server.mixing && !state.soups.some((soup) => soup.follows)) state.soups[0].follows = true;
  changed();
  const time = lasted(performance.now() - began);
  return `Learned from your vote in ${time}: ${id}, ${plural(person.comparisons, "comparison")}.`;
}

export function option(value, text) {
  const found = document.createElement("option");
  found.value = value;
  found.textContent = text;
  return found;
}

function show() {
  const ids = state.people.map((person) => person.id);
  $("person").replaceChildren(option("", "Nobody in particular"), ...ids.map((id) => option(id, id)));
  $("person").value = state.person;
  $("remove-person").disabled = state.person === "";
  const person = known(state.person);
  $("person-note").textContent = person
    ? `${person.trained ? "Known from training; " : ""}${plural(person.comparisons, "comparison")} so far.`
    : "The generic user. Choose or add somebody, so that votes have a person to teach.";
}

async function choose(id) {
  await loadWeights(id);
  state.person = id;
  if (!state.server.mixing) for (const soup of state.soups) if (soup.follows) soup.voice = id;
  if (state.server.mixing && !state.soups.some((soup) => soup.follows)) state.soups[0].follows = true;
  changed();
}

function unfold(open) {
  $("new-form").hidden = !open;
  $("new-person").setAttribute("aria-expanded", String(open));
  if (open) $("new-name").focus();
}

async function add() {
  const id = $("new-name").value;
  // Browsers take these out of addresses, even encoded.
  if ([".", ".."].includes(id)) throw new Failure(`Nobody can be called ${id} here. Choose another name.`);
  learned(await call("v1/users", "POST", { id }));
  $("new-name").value = "";
  unfold(false);
  await choose(id);
  $("person").focus();
}

async function remove() {
  const id = state.person;
  const { warning } = await call(place(id), "DELETE");
  state.people = state.people.filter((person) => person.id !== id);
  for (const soup of state.soups) if (soup.voice === id) soup.voice = "";
  await choose("");
  $("person").focus();
  if (warning) throw new Failure(warning);
}

// `attempt` runs an action and shows what fails.
export function startPeople(attempt) {
  $("people").hidden = false;
  listen(show);
  $("person").addEventListener("change", () => attempt(() => choose($("person").value)));
  $("new-person").addEventListener("click", () => unfold($("new-form").hidden));
  $("new-form").addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(add);
  });
  $("new-form").addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    unfold(false);
    $("new-person").focus();
  });
  $("remove-person").addEventListener("click", () => {
    const count = known(state.person).comparisons;
    $("remove-note").textContent = `${called(state.person)}, with ${plural(count, "comparison")}.`;
    $("remove-dialog").returnValue = "";
    $("remove-dialog").showModal();
  });
  $("remove-dialog").addEventListener("close", () => {
    if ($("remove-dialog").returnValue === "remove") attempt(remove);
  });
}
