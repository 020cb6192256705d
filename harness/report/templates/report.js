"use strict";

// ---- tables that sort: a click on a column's head, numbers as numbers, the other way at the next click

function figureIn(cell) {
  const text = cell.textContent.replace(/\u2212/g, "-").replace(/,(?=\d{3})/g, "").trim();
  const found = text.match(/^[+-]?\d+(\.\d+)?(?!\w)/);
  const unit = { ms: 1e-3, s: 1, MB: 1, "%": 1 }[(text.match(/^[+-]?[\d.]+ (ms|s|MB|%)/) || [])[1]] || 1;
  return found ? Number(found[0]) * unit : null;
}

function sortBy(table, head, index) {
  const down = head.getAttribute("aria-sort") === "ascending";
  const rows = [...table.tBodies[0].rows].map((row) => {
    const cell = row.cells[index];
    return { row, text: cell.textContent.trim(), value: figureIn(cell) };
  });
  const numeric = rows.some((one) => one.value !== null);
  rows.sort((one, other) => {
    if (numeric && (one.value === null || other.value === null)) return (one.value === null) - (other.value === null);
    const order = numeric ? one.value - other.value : one.text.localeCompare(other.text);
    return down ? -order : order;
  });
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  table.tBodies[0].append(...rows.map((one) => one.row));
}

for (const table of document.querySelectorAll("table")) {
  if (!table.tHead || table.tBodies[0].rows.length < 3) continue;
  [...table.tHead.rows[0].cells].forEach((head, index) => {
    head.setAttribute("role", "button");
    head.tabIndex = 0;
    head.addEventListener("click", () => sortBy(table, head, index));
    head.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      sortBy(table, head, index);
    });
  });
}

// ---- drawings that answer a pointer: what a mark stands for is its title

const tooltip = document.createElement("div");
tooltip.id = "tooltip";
tooltip.hidden = true;
document.body.append(tooltip);

function showTip(event) {
  const mark = event.target.closest?.(".tip");
  tooltip.hidden = !mark;
  if (!mark) return;
  tooltip.textContent = mark.dataset.tip;
  const left = Math.min(event.clientX + 14, innerWidth - tooltip.offsetWidth - 8);
  tooltip.style.left = `${Math.max(8, left)}px`;
  tooltip.style.top = `${event.clientY + 18}px`;
}

document.addEventListener("pointermove", showTip);
document.addEventListener("pointerdown", showTip);

// ---- everything is shown on paper

const opened = [];
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details:not([open])")) {
    part.open = true;
    opened.push(part);
  }
});
addEventListener("afterprint", () => {
  for (const part of opened.splice(0)) part.open = false;
});

// ---- players: one at a time, a switch that keeps the place, and a blind test that counts

document.addEventListener("play", (event) => {
  for (const other of document.querySelectorAll("audio")) if (other !== event.target) other.pause();
}, true);

// How often guessing would give a split at least this uneven: the two-sided sign test.
function chance(one, other) {
  const n = one + other;
  let ways = 1, tail = 0;
  for (let k = 0; k <= Math.min(one, other); k++) {
    tail += ways;
    ways = (ways * (n - k)) / (k + 1);
  }
  return Math.min(1, (2 * tail) / 2 ** n);
}

class Pair {
  constructor(root, names, counted) {
    Object.assign(this, { root, names, counted, choice: null });
    this.players = [...root.querySelectorAll(".player")];
    this.votes = root.querySelector(".votes");
    this.votes.hidden = false;
    this.reveal();
  }

  button(text, act) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", act);
    return button;
  }

  // The other sound from the same place on, which is how small differences are heard.
  switchSound() {
    const [one, other] = this.players.map((player) => player.querySelector("audio"));
    const [from, to] = other.paused ? [one, other] : [other, one];
    const at = from.ended ? 0 : from.currentTime;
    from.pause();
    to.currentTime = Number.isFinite(to.duration) ? Math.min(at, to.duration) : 0;
    to.play();
  }

  blind() {
    this.choice = null;
    if (Math.random() < 0.5) this.players.reverse();
    this.votes.before(...this.players);
    this.label(["A", "B"]);
    this.root.classList.remove("revealed");
    const choices = ["A is better", "no difference", "B is better"];
    this.votes.replaceChildren(
      this.button("switch", () => this.switchSound()),
      ...choices.map((text, index) => this.button(text, () => this.vote(index))),
    );
  }

  vote(index) {
    const chosen = [this.players[0], null, this.players[1]][index];
    this.choice = chosen ? Number(chosen.dataset.index) : "none";
    this.reveal();
    this.players.forEach((player) => player.classList.toggle("chosen", player === chosen));
    this.root.classList.add("revealed");
    this.votes.append(chosen ? `You preferred ${this.names[this.choice]}.` : "You heard no difference.");
    this.counted();
  }

  reveal() {
    this.players.sort((one, other) => one.dataset.index - other.dataset.index);
    if (this.choice === null) this.votes.before(...this.players);
    this.label(this.names);
    this.root.classList.remove("revealed");
    this.votes.replaceChildren(this.button("switch", () => this.switchSound()));
  }

  label(names) {
    for (const player of this.players) {
      const name = names === this.names ? names[player.dataset.index] : names[this.players.indexOf(player)];
      player.querySelector(".name").textContent = name;
      player.querySelector("audio").setAttribute("aria-label", name);
    }
  }
}

for (const root of document.querySelectorAll(".listening")) {
  const names = JSON.parse(root.dataset.names);
  const tally = root.querySelector("output");
  const count = () => {
    const votes = pairs.map((pair) => pair.choice);
    const [one, other, none] = [0, 1, "none"].map((choice) => votes.filter((vote) => vote === choice).length);
    if (one + other + none === 0) return void (tally.textContent = "");
    const split = one + other ? ` Guessing gives a split this uneven in ${Math.round(100 * chance(one, other))} %.` : "";
    tally.textContent =
      `${names[0]} ${one}, ${names[1]} ${other}, no difference ${none} of ${votes.length}.${split}`;
  };
  const pairs = [...root.querySelectorAll(".pair")].map((pair) => new Pair(pair, names, count));
  const bar = root.querySelector(".blind");
  bar.hidden = false;
  bar.querySelector("input").addEventListener("change", (event) => {
    for (const pair of pairs) event.target.checked ? pair.blind() : ((pair.choice = null), pair.reveal());
    count();
  });
}
