// The conversation. gr.HTML runs this file once, after common.js, with `element`, `props`, `trigger` and `watch`; `props.value` is what workstation.py's
// `conversation_data` gives.
//
// Everything that somebody wrote, the model included, enters the page as text, never as HTML and never through a template.

const log = element.querySelector(".log"), hints = element.querySelector(".hints"), problemLine = element.querySelector(".problem");
let shownTurns = [], told = 0, editing = null;  // the question that is being changed
let follow = true;  // the newest answer stays in sight, until somebody scrolls up

log.addEventListener("scroll", () => { follow = log.scrollHeight - log.scrollTop - log.clientHeight < 60; });
new ResizeObserver(toNewest).observe(log);  // what stands below it comes and goes
function toNewest() { if (follow) log.scrollTop = log.scrollHeight; }

function asked(turn, last) {
  const row = make("div", "asked"), bubble = make("div", "bubble", turn.question);
  row.append(bubble);
  if (last && !turn.open) row.append(button("Edit", "quiet", () => edit(row, turn), "Change the question and ask again"));
  return row;
}

function edit(row, turn) {
  const field = make("textarea", "editor", "", { value: turn.question, rows: 3 });
  field.setAttribute("aria-label", "The question, to be changed");
  const done = () => { editing = null; shownTurns = []; update(); };
  const send = () => { const words = field.value; done(); trigger("edit", { value: words }); };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); send(); }
    if (event.key === "Escape") done();
  });
  const choices = make("div", "choices");
  choices.append(button("Cancel", "quiet", done), button("Ask again", "strong", send));
  row.replaceChildren(field, choices);
  editing = turn.question;
  field.focus();
}

// The answer's words, of which those that name a finding lead to it on the scan.
function worded({ answer, stated }) {
  const letters = Array.from(answer), parts = [];  // as the server counts, not as JavaScript does
  let end = 0;
  for (const [from, to, name] of stated) {
    const words = letters.slice(from, to).join("");
    parts.push(letters.slice(end, from).join(""), button(words, "finding", () => workstation.locate(name), `Show ${name} on the scan`));
    end = to;
  }
  return [...parts, letters.slice(end).join("")];
}

function answered(turn, last, index, explained) {
  const card = make("div", `answered ${turn.state}`), text = make("div", "text");
  text.append(...worded(turn));
  if (turn.state === "waiting") text.replaceChildren(make("span", "dots", "Waiting for the model"));
  card.append(text);
  const line = make("div", "line");
  if (turn.broken) line.append(make("span", "chip low", "connection lost"));
  if (turn.open) line.append(button("Stop", "strong", () => trigger("stop"), "End this answer here"));
  if (turn.state === "stopped" && !turn.broken) line.append(make("span", "chip", "stopped"));
  if (turn.confidence !== null) {
    const percent = `${Math.round(100 * turn.confidence)} %`;
    const words = (turn.low ? `low confidence, ${percent}` : `confidence ${percent}`) + (turn.unlike ? ", on a scan unlike the training data" : "");
    const chip = make("span", turn.low || turn.unlike ? "chip low" : "chip", words, { title: explained, tabIndex: 0 });
    line.append(chip, make("span", "figures", `${turn.seconds.toFixed(1)} s · ${turn.tokens} tokens`));
  }
  if (!turn.open && last) line.append(button("Retry", "quiet", () => trigger("retry"), "Ask the same once more"));
  if (turn.state === "done" && props.value.grounded) {
    line.append(button("Where did it look?", "quiet", () => trigger("select", { value: index }), "Show on the scan what moved the model to this answer"));
  }
  card.append(line);
  return card;
}

function update() {
  const { suggestions, problem, explained, scan } = props.value;
  const turns = props.value.turns.map((turn) => (turn.open && workstation.lost ? { ...turn, open: false, state: "stopped", broken: true } : turn));
  const lately = turns[turns.length - 1];
  if (editing !== null && (!lately || lately.open || lately.question !== editing)) [editing, shownTurns] = [null, []];  // it is gone
  if (problem || !lately || !lately.open || turns.length !== told) {  // the words that stream in do not wipe it away
    problemLine.textContent = problem;
    problemLine.hidden = !problem;
  }
  if (turns.length > told) follow = true;
  told = turns.length;
  tell({ scan, turns: turns.length, answering: Boolean(lately && lately.open) });
  if (editing !== null) return;
  turns.forEach((turn, index) => {
    const last = index === turns.length - 1, state = JSON.stringify([turn, last]);
    if (shownTurns[index] === state) return;
    const old = log.children[index], open = old && shownTurns[index] && old.querySelector(".answered.waiting, .answered.writing");
    if (open && turn.state === "writing") {  // Stop stays the button that is being pressed
      open.className = "answered writing";
      open.querySelector(".text").textContent = turn.answer;
      shownTurns[index] = state;
      return;
    }
    const node = make("article", "turn");
    node.append(asked(turn, last), answered(turn, last, index, explained));
    if (old) old.replaceWith(node); else log.append(node);
    shownTurns[index] = state;
  });
  while (log.children.length > turns.length) log.lastChild.remove();
  shownTurns.length = turns.length;
  element.dataset.state = turns.length ? "talking" : scan ? "ready" : "empty";
  hints.replaceChildren(...suggestions.map((words) => button(words, "hint", () => trigger("example_select", { value: words }))));
  toNewest();
}

workstation.parts.push(update);
watch("value", update);
update();
