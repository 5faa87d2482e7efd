// What the page shows: the server, the people it knows, and the soups. Changes are told to all parts of the page.

import { complete, even } from "./weights.js";

const STORE = "pjrlhf.page";
export const LETTERS = ["A", "B", "C", "D"];

export const state = {
  server: null, // what /page/about tells
  people: [], // as the server lists them
  person: "", // the id of who asks; "" for nobody in particular
  // {follows, mix}: weights, which are those of the person while `follows`; {voice}: who answers where people have
  // user tokens and no weights, an id, "" for nobody in particular, null for the base.
  soups: [],
  selected: 0,
  corners: [], // of the triangle
};

const listeners = [];
export const listen = (listener) => listeners.push(listener);

export function changed() {
  if (state.server.mixing) for (const soup of state.soups) if (soup.follows) soup.mix = personal();
  const { person, soups, selected, corners } = state;
  sessionStorage.setItem(STORE, JSON.stringify({ person, soups, selected, corners }));
  for (const listener of listeners) listener();
}

export const names = () => state.server.ingredients.map((ingredient) => ingredient.name);
export const labelOf = (name) => state.server.ingredients.find((ingredient) => ingredient.name === name)?.label || name;
export const known = (id) => state.people.find((person) => person.id === id);
export const called = (id) => (id === null ? "the base" : id === "" ? "nobody in particular" : id);

// The weights of the person; those of the generic user where nobody is chosen.
export function personal() {
  const mix = known(state.person)?.mix ?? state.server.generic;
  return mix ? complete(names(), mix) : even(names());
}

export function another() {
  if (!state.server.mixing) return { voice: "" };
  const mix = Object.fromEntries(names().map((name) => [name, 0]));
  return { follows: false, mix };
}

// Three ingredients of three dimensions where there are as many.
function corners() {
  const firsts = new Map();
  for (const { name, dimension } of state.server.ingredients) {
    if (!firsts.has(dimension)) firsts.set(dimension, name);
  }
  return [...new Set([...firsts.values(), ...names()])].slice(0, 3);
}

// The first soup follows the person; the second is the base.
function fresh() {
  state.soups = state.server.mixing ? [{ follows: true, mix: personal() }, another()] : [{ follows: true, voice: "" }, another()];
  state.selected = 0;
  state.corners = names().length >= 3 ? corners() : [];
}

// What this tab showed before, where it still fits what is served.
export function restore() {
  fresh();
  let stored = null;
  try {
    stored = JSON.parse(sessionStorage.getItem(STORE));
  } catch {
    // Not ours: start afresh.
  }
  if (stored === null || typeof stored !== "object") return;
  if (known(stored.person)) state.person = stored.person;
  const soups = Array.isArray(stored.soups) ? stored.soups.slice(0, LETTERS.length) : [];
  if (soups.length >= 2 && soups.every((soup) => (state.server.mixing ? soup?.mix : soup?.voice !== undefined))) {
    state.soups = soups.map((soup) => {
      const follows = soup.follows === true;
      if (state.server.mixing) return { follows, mix: complete(names(), soup.mix) };
      return { follows, voice: soup.voice === null || known(soup.voice) ? soup.voice : "" };
    });
  }
  if (state.soups[stored.selected]) state.selected = stored.selected;
  const chosen = Array.isArray(stored.corners) ? stored.corners.filter((name) => names().includes(name)) : [];
  if (new Set(chosen).size === 3 && chosen.length === 3) state.corners = chosen;
}
