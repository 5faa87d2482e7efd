// The soups: a tab for each, sliders for its weights, and the triangle.

import { LETTERS, another, called, changed, labelOf, listen, names, personal, state } from "./state.js";
import { option } from "./people.js";
import { Triangle } from "./triangle.js";
import { even, random, shown, zero } from "./weights.js";

const $ = (id) => document.getElementById(id);
const sliders = new Map(); // name -> [input, output]
const selects = []; // corners of the triangle
let triangle = null;
let voices = []; // of the list of who answers

const soup = () => state.soups[state.selected];

function setMix(mix) {
  Object.assign(soup(), { follows: false, mix });
  changed();
}

// ---- tabs

function showTabs() {
  while ($("tabs").children.length > state.soups.length) $("tabs").lastChild.remove();
  while ($("tabs").children.length < state.soups.length) {
    const tab = document.createElement("button");
    const number = $("tabs").children.length;
    tab.type = "button";
    tab.id = `tab-${number}`;
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", "editor");
    tab.setAttribute("aria-label", `Soup ${LETTERS[number]}`);
    tab.textContent = LETTERS[number];
    tab.addEventListener("click", () => select(number));
    $("tabs").append(tab);
  }
  [...$("tabs").children].forEach((tab, number) => {
    const own = number === state.selected;
    tab.setAttribute("aria-selected", String(own));
    tab.tabIndex = own ? 0 : -1;
  });
  $("editor").setAttribute("aria-labelledby", `tab-${state.selected}`);
  $("add-soup").disabled = state.soups.length === LETTERS.length;
  $("remove-soup").disabled = state.soups.length === 2;
}

function select(number) {
  state.selected = number;
  changed();
}

function pressTab(event) {
  const last = state.soups.length - 1;
  const now = state.selected;
  const moves = {
    ArrowLeft: now ? now - 1 : last,
    ArrowRight: now < last ? now + 1 : 0,
    Home: 0,
    End: last,
  };
  if (moves[event.key] === undefined) return;
  event.preventDefault();
  select(moves[event.key]);
  $("tabs").children[state.selected].focus();
}

// ---- sliders

function slider(ingredient) {
  const row = document.createElement("div");
  row.className = "slider";
  const [label, hue, name, input, output] = ["label", "span", "span", "input", "output"].map((tag) =>
    document.createElement(tag),
  );
  hue.className = `swatch hue-${sliders.size % 8}`;
  input.id = `slider-${sliders.size}`;
  label.htmlFor = output.htmlFor = input.id;
  label.append(hue, ingredient.label || ingredient.name);
  if (ingredient.label) {
    name.className = "soft";
    name.textContent = ` ${ingredient.name}`;
    label.append(name);
  }
  Object.assign(input, { type: "range", step: "0.01" });
  input.addEventListener("input", () => setMix({ ...soup().mix, [ingredient.name]: Number(input.value) }));
  row.append(label, output, input);
  if (ingredient.description) {
    const text = document.createElement("p");
    text.id = `${input.id}-text`;
    text.className = "soft";
    text.textContent = ingredient.description;
    input.setAttribute("aria-describedby", text.id);
    row.append(text);
  }
  sliders.set(ingredient.name, [input, output]);
  return row;
}

// Sliders in groups, one for each dimension.
function buildSliders() {
  const groups = new Map();
  for (const ingredient of state.server.ingredients) {
    if (!groups.has(ingredient.dimension)) groups.set(ingredient.dimension, []);
    groups.get(ingredient.dimension).push(ingredient);
  }
  for (const [dimension, ingredients] of groups) {
    const group = document.createElement("fieldset");
    const legend = document.createElement("legend");
    legend.textContent = dimension || (groups.size > 1 ? "other" : "weights");
    group.append(legend, ...ingredients.map(slider));
    $("sliders").append(group);
  }
}

// ---- the triangle

function buildTriangle() {
  const root = $("triangle");
  $("three").hidden = false;
  $("three").open = matchMedia("(min-width: 821px)").matches;
  const help = document.createElement("p");
  help.id = "triangle-help";
  help.className = "soft";
  help.textContent = "Drag the point, or move it with the arrow keys; Home is the middle.";
  root.append(help);
  for (let corner = 0; corner < 3; corner++) {
    const choice = document.createElement("select");
    choice.className = ["top", "left", "right"][corner];
    choice.setAttribute("aria-label", `Corner: ${choice.className}`);
    choice.append(...names().map((name) => option(name, labelOf(name))));
    choice.addEventListener("change", () => {
      // The name may be at another corner: the two change places.
      const old = state.corners[corner];
      state.corners = state.corners.map((name) => (name === choice.value ? old : name));
      state.corners[corner] = choice.value;
      changed();
    });
    selects.push(choice);
    root.append(choice);
    if (corner === 0) {
      triangle = new Triangle(root, help.id, (weights) => {
        const moved = Object.fromEntries(state.corners.map((name, i) => [name, weights[i]]));
        setMix({ ...soup().mix, ...moved });
      });
    }
  }
}

// ---- all of it

function showMix() {
  const { mix, follows } = soup();
  for (const [name, [input, output]] of sliders) {
    // A weight out of the usual range widens its slider.
    input.min = Math.min(0, Math.floor(mix[name]));
    input.max = Math.max(1, Math.ceil(mix[name]));
    input.value = mix[name];
    output.textContent = shown(mix[name]);
    input.setAttribute("aria-valuetext", shown(mix[name]));
  }
  $("soup-note").textContent = follows
    ? `The weights of ${state.person === "" ? "the generic user" : state.person}.`
    : Object.values(mix).every((weight) => weight === 0)
      ? "The base without any ingredient."
      : "Set by hand.";
  if (triangle) {
    selects.forEach((choice, corner) => (choice.value = state.corners[corner]));
    triangle.show(state.corners.map((name) => mix[name]), state.corners.map(labelOf));
  }
}

function showVoice() {
  // By number: an id may be any text.
  voices = [null, "", ...state.people.map((person) => person.id)];
  $("voice").replaceChildren(...voices.map((voice, i) => option(String(i), called(voice))));
  $("voice").value = String(voices.indexOf(soup().voice));
}

export function startEditor() {
  const { mixing } = state.server;
  $("mixing").hidden = !mixing;
  $("voices").hidden = mixing || !state.server.people;
  $("only-base").hidden = mixing || state.server.people;
  $("set-person").hidden = !state.server.people;
  if (mixing) {
    buildSliders();
    if (names().length >= 3) buildTriangle();
  }
  listen(() => {
    showTabs();
    if (mixing) showMix();
    else showVoice();
  });
  $("tabs").addEventListener("keydown", pressTab);
  $("add-soup").addEventListener("click", () => {
    state.soups.push(another());
    select(state.soups.length - 1);
  });
  $("remove-soup").addEventListener("click", () => {
    state.soups.splice(state.selected, 1);
    select(Math.min(state.selected, state.soups.length - 1));
  });
  $("set-person").addEventListener("click", () => {
    Object.assign(soup(), { follows: true, mix: personal() });
    changed();
  });
  $("set-even").addEventListener("click", () => setMix(even(names())));
  $("set-zero").addEventListener("click", () => setMix(zero(names())));
  $("set-random").addEventListener("click", () => setMix(random(names())));
  $("voice").addEventListener("change", () => {
    Object.assign(soup(), { follows: false, voice: voices[Number($("voice").value)] });
    changed();
  });
}
