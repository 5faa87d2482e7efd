// Questions that the server asks a person: two answers to choose from, of which the choice tells most about them.

import { call } from "./api.js";
import { LEARNING, patiently, place, teach } from "./people.js";
import { listen, state } from "./state.js";

const $ = (id) => document.getElementById(id);

let asking = null; // the id of the person who is asked
let found = null; // {index, pair: {prompt or messages, answers}} on the page
let busy = false;
const skipped = new Set();

const textOf = (prompt) =>
  typeof prompt === "string"
    ? prompt
    : prompt.length === 1
      ? prompt[0].content
      : prompt.map(({ role, content }) => `${role}: ${content}`).join("\n");

function show() {
  $("quiz-pair").hidden = $("quiz-choices").hidden = found === null;
  if (found === null) return;
  $("quiz-prompt").textContent = textOf(found.pair.messages ?? found.pair.prompt);
  found.pair.answers.forEach((answer, i) => ($(`quiz-answer-${i}`).textContent = textOf(answer)));
}

async function next(note = "quiz-note") {
  const id = asking;
  const { data } = await patiently($(note), () => call(`${place(id)}/next`, "POST", {}));
  if (asking !== id) return;
  found = data.find(({ index }) => !skipped.has(index)) ?? null;
  show();
  if (found === null) $("quiz-note").textContent = `${$("quiz-note").textContent} No questions are left.`.trim();
}

// Both orders mean that neither is better.
function comparisons(best) {
  const { answers, ...rest } = found.pair;
  const orders = best === null ? [[0, 1], [1, 0]] : [[best, 1 - best]];
  return orders.map(([chosen, rejected]) => ({ ...rest, chosen: answers[chosen], rejected: answers[rejected] }));
}

function stop() {
  asking = found = null;
  $("quiz").hidden = true;
}

function showPlace() {
  $("ask-me").hidden = !state.server.asks;
  $("ask-me").disabled = state.person === "";
  if (asking !== null && asking !== state.person) stop();
}

// `attempt` runs an action and shows what fails.
export function startQuestions(attempt) {
  const alone = (action) => async () => {
    if (busy) return; // a button that is disabled would lose the focus
    busy = true;
    for (const id of ["quiz", "ask-me"]) $(id).setAttribute("aria-busy", "true");
    await attempt(action);
    busy = false;
    for (const id of ["quiz", "ask-me"]) $(id).setAttribute("aria-busy", "false");
    $("ask-note").textContent = "";
    if ($("quiz-note").textContent === LEARNING) $("quiz-note").textContent = ""; // it failed
  };
  const choose = (best) =>
    alone(async () => {
      $("quiz-note").textContent = LEARNING;
      $("quiz-note").textContent = await patiently($("quiz-note"), () => teach(comparisons(best)));
      await next();
    });
  listen(showPlace);
  $("ask-me").addEventListener(
    "click",
    alone(async () => {
      asking = state.person;
      skipped.clear();
      $("quiz-note").textContent = "";
      $("ask-note").textContent = "Looking for the question that tells most…";
      await next("ask-note");
      if (asking === null) return;
      $("quiz").hidden = false;
      $("quiz-title").focus();
    }),
  );
  [0, 1, null].forEach((best, i) => $(`quiz-choice-${i}`).addEventListener("click", choose(best)));
  $("quiz-skip").addEventListener(
    "click",
    alone(async () => {
      skipped.add(found.index);
      await next();
    }),
  );
  $("quiz-stop").addEventListener("click", () => {
    stop();
    $("ask-me").focus();
  });
}
