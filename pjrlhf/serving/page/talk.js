// Questions, answers side by side, and votes.

import { stream } from "./api.js";
import { LEARNING, patiently, teach } from "./people.js";
import { LETTERS, called, labelOf, listen, state } from "./state.js";
import { lasted, plural, sent, shown } from "./weights.js";

const $ = (id) => document.getElementById(id);
const FIELDS = ["question", "temperature", "limit", "seed"];
const STORE = "pjrlhf.question";

let cards = []; // one for each soup: its elements and its answer
let asked = null; // {question, abort} of the answers on the page
let voted = false;

class Card {
  constructor(number) {
    this.letter = LETTERS[number];
    this.text = "";
    this.state = "empty"; // then streaming, done, stopped or failed
    this.root = document.createElement("article");
    this.root.setAttribute("aria-label", `Answer of soup ${this.letter}`);
    const head = document.createElement("h3");
    head.textContent = this.letter;
    [this.bar, this.mix, this.answer, this.note] = ["div", "p", "div", "p"].map((tag) => document.createElement(tag));
    this.bar.className = "bar";
    this.bar.setAttribute("aria-hidden", "true");
    this.bar.hidden = !state.server.mixing;
    this.mix.className = "mix soft";
    this.answer.className = "answer";
    this.answer.setAttribute("aria-live", "polite");
    this.note.className = "soft";
    this.root.append(head, this.bar, this.mix, this.answer, this.note);
  }

  // The soup that gave the answer, or will give it.
  showSoup(soup) {
    if (!state.server.mixing) {
      this.mix.textContent = state.server.people ? `As ${called(soup.voice)}.` : "The base";
      return;
    }
    const parts = state.server.ingredients.map(({ name }, i) => ({ name, i, weight: soup.mix[name] }));
    const used = parts.filter(({ weight }) => shown(weight) !== "0.00");
    const sum = used.reduce((found, { weight }) => found + Math.abs(weight), 0);
    this.mix.textContent = used.map(({ name, weight }) => `${labelOf(name)} ${shown(weight)}`).join(" · ") || "The base";
    this.bar.replaceChildren(
      ...used.map(({ i, weight }) => {
        const part = document.createElement("span");
        part.className = `part hue-${i % 8}${weight < 0 ? " negative" : ""}`;
        part.style.width = `${(100 * Math.abs(weight)) / sum}%`;
        return part;
      }),
    );
  }

  set(next, note = "") {
    this.state = next;
    this.note.textContent = note;
    this.root.classList.toggle("failed", next === "failed");
    this.answer.setAttribute("aria-busy", String(next === "streaming"));
  }

  async fill(soup, body, path, signal) {
    this.asked = JSON.stringify(soup);
    this.text = "";
    this.answer.textContent = "";
    this.set("streaming", "Answering…");
    const began = performance.now();
    let tokens = 0;
    try {
      for await (const chunk of stream(path, body, signal)) {
        if (chunk.usage) tokens = chunk.usage.completion_tokens;
        const choice = chunk.choices[0];
        const piece = choice?.delta?.content ?? choice?.text ?? "";
        this.text += piece;
        this.answer.append(piece);
      }
      this.set("done", `${plural(tokens, "token")} in ${lasted(performance.now() - began)}`);
      if (this.text === "") this.answer.textContent = "(an empty answer)";
    } catch (problem) {
      if (problem.name === "AbortError") this.set("stopped", "Stopped.");
      else this.set("failed", problem.message);
      if (problem.status === 401) throw problem;
    }
  }
}

// ---- asking

function number(id) {
  const text = $(id).value.trim();
  return text === "" ? undefined : Number(text);
}

function bodyFor(soup, question, seed) {
  const body = { temperature: number("temperature") ?? 1, seed, stream_options: { include_usage: true } };
  const limit = number("limit");
  if (limit !== undefined) body.max_tokens = limit;
  else if (!state.server.chat) body.max_tokens = state.server.longest;
  if (state.server.chat) body.messages = [{ role: "user", content: question }];
  else body.prompt = question;
  if (state.server.mixing) Object.assign(body, { model: state.server.base, mix: sent(soup.mix) });
  else if (soup.voice) Object.assign(body, { model: state.server.model, user: soup.voice });
  else body.model = soup.voice === null ? state.server.base : state.server.model;
  return body;
}

async function ask() {
  asked?.abort.abort();
  const question = $("question").value;
  const abort = new AbortController();
  const mine = { question, abort };
  asked = mine;
  voted = false;
  const seed = number("seed") ?? Math.floor(Math.random() * 2 ** 31);
  const path = state.server.chat ? "v1/chat/completions" : "v1/completions";
  $("stop").hidden = false;
  $("status").textContent = "Answering…";
  const filled = state.soups.map((soup, i) => {
    cards[i].showSoup(soup);
    return cards[i].fill(soup, bodyFor(soup, question, seed), path, abort.signal);
  });
  showVote();
  const ends = await Promise.allSettled(filled);
  if (asked !== mine) return;
  if (document.activeElement === $("stop")) $("send").focus();
  $("stop").hidden = true;
  const done = cards.filter((card) => card.state === "done").length;
  $("status").textContent = `${done} of ${cards.length} answers are complete.`;
  showVote();
  const refused = ends.find((end) => end.status === "rejected");
  if (refused) throw refused.reason;
}

// ---- voting

const sides = (best, other) => ({ chosen: best.text, rejected: other.text });

// The comparisons that a vote means; with no difference each is as good as the other.
function comparisons(best) {
  const found = [];
  for (const one of cards) {
    for (const other of cards) {
      if (one.text === other.text) continue;
      if (best === null ? one !== other : one === best) found.push(sides(one, other));
    }
  }
  const prompt = state.server.chat
    ? { messages: [{ role: "user", content: asked.question }] }
    : { prompt: asked.question };
  return found.map((pair) => ({ ...prompt, ...pair }));
}

function voteButton(text, label, best) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.setAttribute("aria-label", label);
  button.addEventListener("click", () => attemptVote(best));
  return button;
}

let attemptVote = () => {};

async function vote(best) {
  voted = true;
  showVote();
  $("status").textContent = LEARNING;
  try {
    $("status").textContent = await patiently($("status"), () => teach(comparisons(best)));
    $("question").focus();
  } catch (problem) {
    voted = false;
    $("status").textContent = "";
    showVote();
    throw problem;
  }
}

function showVote() {
  const complete = cards.length > 0 && cards.every((card) => card.state === "done");
  $("vote").hidden = !(state.server.learns && complete);
  if ($("vote").hidden) return;
  const [first, second] = cards;
  const same = cards.every((card) => card.text === first.text);
  if ($("choices").children.length !== cards.length + 1) {
    const better = cards.length === 2 ? "better" : "best";
    $("vote-title").textContent = `Which do you like ${better}?`;
    const choices = cards.map((card) => voteButton(card.letter, `${card.letter} is ${better}`, card));
    choices.splice(cards.length === 2 && second ? 1 : cards.length, 0, voteButton("No difference", "No difference", null));
    $("choices").replaceChildren(...choices);
  }
  const why = voted
    ? "Thank you. Ask again to compare more."
    : same
      ? "The answers are the same; there is nothing to learn."
      : state.person === ""
        ? "Choose or add a person first: votes teach that person."
        : `Teaches ${state.person}.`;
  $("vote-note").textContent = why;
  for (const button of $("choices").children) button.disabled = voted || same || state.person === "";
}

// ---- all of it

function showCards() {
  if (cards.length !== state.soups.length) {
    asked?.abort.abort();
    asked = null;
    $("stop").hidden = true;
    cards = state.soups.map((_, i) => new Card(i));
    $("answers").replaceChildren(...cards.map((card) => card.root));
    $("answers").dataset.count = cards.length;
    $("choices").replaceChildren();
  }
  state.soups.forEach((soup, i) => {
    const card = cards[i];
    if (card.state === "empty") card.showSoup(soup);
    else card.root.classList.toggle("stale", card.asked !== JSON.stringify(soup));
  });
  showVote();
}

function keepFields() {
  const values = Object.fromEntries(FIELDS.map((id) => [id, $(id).value]));
  sessionStorage.setItem(STORE, JSON.stringify(values));
}

function restoreFields() {
  try {
    const values = JSON.parse(sessionStorage.getItem(STORE)) ?? {};
    for (const id of FIELDS) if (typeof values[id] === "string") $(id).value = values[id];
  } catch {
    // Not ours: the fields keep what they have.
  }
}

function showExamples() {
  const { examples } = state.server;
  $("examples").hidden = examples.length === 0;
  $("examples").replaceChildren(
    ...examples.map((text) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = text;
      button.addEventListener("click", () => {
        $("question").value = text;
        keepFields();
        $("question").focus();
      });
      return button;
    }),
  );
}

// `attempt` runs an action and shows what fails.
export function startTalk(attempt) {
  attemptVote = (best) => attempt(() => vote(best));
  restoreFields();
  showExamples();
  listen(showCards);
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    keepFields();
    attempt(ask);
  });
  $("ask").addEventListener("change", keepFields);
  $("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("ask").requestSubmit();
  });
  $("stop").addEventListener("click", () => asked?.abort.abort());
}
