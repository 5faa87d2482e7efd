// The page of the server: asks for the key where there is one, and starts its parts.

import { call, key } from "./api.js";
import { startEditor } from "./editor.js";
import { loadPeople, loadWeights, startPeople } from "./people.js";
import { startQuestions } from "./questions.js";
import { changed, restore, state } from "./state.js";
import { startTalk } from "./talk.js";

const $ = (id) => document.getElementById(id);

function tell(message) {
  $("notice").textContent = message;
  $("notice").hidden = message === "";
}

// Runs an action of a person, and says what has failed.
async function attempt(action) {
  tell("");
  try {
    await action();
  } catch (problem) {
    tell(problem.message);
    if (problem.status === 401) {
      key.clear();
      askForKey("The server does not take this key any more.");
    }
  }
}

function askForKey(note) {
  if (note) $("key-note").textContent = note;
  $("key").value = "";
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

let started = false;

async function start() {
  const about = await call("page/about");
  if (about.locked) {
    askForKey(key.get() ? "This is not the key of the server; try again." : "");
    return;
  }
  tell("");
  if (started) return; // a new key for a page that is there already
  started = true;
  state.server = about;
  document.title = $("title").textContent = about.title || "Soups";
  $("report").hidden = !about.report;
  if (about.people) await loadPeople();
  restore();
  await loadWeights(state.person);
  startEditor();
  if (about.people) {
    startPeople(attempt);
    startQuestions(attempt);
  }
  startTalk(attempt);
  changed();
  $("main").hidden = false;
}

$("key-form").addEventListener("submit", () => {
  key.set($("key").value.trim());
  attempt(start);
});
$("key-dialog").addEventListener("cancel", (event) => event.preventDefault());
attempt(start);
