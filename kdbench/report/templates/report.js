"use strict";
// Sorting, filtering, tips and, where a server stands behind the page, renewal. Without it the page is whole, only still.

const state = { sorts: new Map(), filter: "" };
const tip = document.getElementById("tip");
const say = (text) => { document.getElementById("status").textContent = text; };

// --- sorting: a column's header is a button; numbers best first, texts from A on, a second press turns the order round

function compare(a, b) {
  if (a === "" || b === "") return (a === "") - (b === ""); // what is unknown stands last, whichever way the column is sorted
  const numeric = !Number.isNaN(Number(a)) && !Number.isNaN(Number(b));
  return numeric ? Number(a) - Number(b) : a.localeCompare(b);
}

function sort(table, column, direction) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, i) => (i === column ? header.setAttribute("aria-sort", direction) : header.removeAttribute("aria-sort")));
  const value = (row) => row.cells[column].dataset.value;
  const sign = direction === "ascending" ? 1 : -1;
  const rows = [...table.tBodies[0].rows].sort((x, y) => {
    const [a, b] = [value(x), value(y)];
    return a === "" || b === "" ? compare(a, b) : sign * compare(a, b);
  });
  table.tBodies[0].append(...rows);
  state.sorts.set(table.id, [column, direction]);
}

function pressed(button) {
  const header = button.closest("th");
  const table = header.closest("table");
  const ascendingFirst = header.classList.contains("text") || ["№", "rank"].includes(button.textContent);
  const [first, second] = ascendingFirst ? ["ascending", "descending"] : ["descending", "ascending"];
  const direction = header.getAttribute("aria-sort") === first ? second : first;
  sort(table, header.cellIndex, direction);
  say(`sorted by ${button.textContent}, ${direction}`);
}

// --- filtering: rows go, marks of charts fade

function filter(text) {
  state.filter = text;
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const scopes = document.querySelectorAll("section.one-board, table#table-index");
  let shown = 0;
  for (const scope of scopes) {
    const kept = new Set();
    for (const row of scope.querySelectorAll("tr[data-search]")) {
      const fits = words.every((word) => row.dataset.search.toLowerCase().includes(word));
      row.classList.toggle("filtered", !fits);
      if (fits) kept.add(row.dataset.method);
    }
    shown += kept.size;
    for (const other of scope.querySelectorAll("[data-method]:not(tr[data-search])")) {
      const gone = words.length > 0 && !kept.has(other.dataset.method);
      other.classList.toggle(other.matches("g, .forest li") ? "faded" : "filtered", gone);
    }
  }
  say(words.length ? `${shown} rows match` : "all rows are shown");
}

// --- tips: what a mark says, beside the pointer or the focus

let pointed = false; // whether the pointer called for the tip, or the focus, which a resting pointer must not end

function showTip(mark, x, y, byPointer) {
  pointed = byPointer;
  tip.textContent = mark.dataset.tip;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 4))}px`;
  tip.style.top = `${y + 18 + height > innerHeight ? y - height - 10 : y + 18}px`;
}

function light(method, scope, on) {
  for (const other of scope.querySelectorAll("[data-method]")) other.classList.toggle("lit", on && other.dataset.method === method);
}

document.addEventListener("pointerover", (event) => {
  const mark = event.target.closest("[data-tip]");
  if (mark) showTip(mark, event.clientX, event.clientY, true);
  else if (pointed) tip.hidden = true;
  const named = event.target.closest("[data-method]");
  const scope = event.target.closest("section");
  if (scope) light(named && named.dataset.method, scope, Boolean(named));
});
document.addEventListener("focusin", (event) => {
  const mark = event.target.closest(".mark[data-tip]");
  if (!mark) return void (tip.hidden = true);
  const box = mark.querySelector(".spot, .trial, .cross, .name, .curve")?.getBoundingClientRect() ?? mark.getBoundingClientRect();
  showTip(mark, box.left + box.width / 2, box.top + box.height / 2, false);
  light(mark.dataset.method, mark.closest("section"), true);
});

// --- keys: one stop of the tab key a chart, arrows between its marks; Escape takes a tip away

function prepare() {
  for (const plot of document.querySelectorAll(".plot")) plot.querySelector(".mark")?.setAttribute("tabindex", "0");
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") tip.hidden = true;
  const mark = event.target.closest?.(".plot .mark");
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (!mark || !step) return;
  event.preventDefault();
  const marks = [...mark.closest(".plot").querySelectorAll(".mark")];
  const next = marks[(marks.indexOf(mark) + step + marks.length) % marks.length];
  mark.setAttribute("tabindex", "-1");
  next.setAttribute("tabindex", "0");
  next.focus();
});

document.addEventListener("click", (event) => {
  const button = event.target.closest("table.sortable thead button");
  if (button) pressed(button);
  const link = event.target.closest("a[data-opens]");
  if (link) document.getElementById(decodeURIComponent(link.hash.slice(1))).open = true;
  if (event.target.closest("#save")) {
    const blob = new Blob([document.getElementById("data").textContent], { type: "application/json" });
    const made = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: "leaderboard.json" });
    made.click();
    setTimeout(() => URL.revokeObjectURL(made.href), 1000);
  }
});
document.addEventListener("input", (event) => { if (event.target.id === "filter") filter(event.target.value); });

// --- renewal: the server is asked for its version; a new page takes the old one's place and keeps what the reader had set

async function renew() {
  const answer = await fetch("/", { cache: "no-store" });
  if (!answer.ok) throw new Error(answer.statusText);
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  const open = [...document.querySelectorAll("details[open]")].map((details) => details.id);
  const focused = document.activeElement?.closest("[id]")?.id;
  const [x, y] = [scrollX, scrollY];
  document.getElementById("boards").replaceWith(document.adoptNode(fresh.getElementById("boards")));
  document.getElementById("data").textContent = fresh.getElementById("data").textContent;
  document.querySelector("footer").replaceWith(document.adoptNode(fresh.querySelector("footer")));
  for (const id of open) document.getElementById(id)?.setAttribute("open", "");
  for (const [id, [column, direction]] of state.sorts) if (document.getElementById(id)) sort(document.getElementById(id), column, direction);
  prepare();
  filter(state.filter);
  if (focused) document.getElementById(focused)?.focus?.({ preventScroll: true });
  scrollTo(x, y);
  say("new results are shown");
}

async function watch() {
  const note = document.querySelector(".live");
  let known = document.body.dataset.live;
  for (;;) {
    try {
      const { version } = await (await fetch("/version", { cache: "no-store" })).json();
      if (version !== known) await renew();
      known = version;
      note.classList.remove("lost");
      note.textContent = "Live: new results appear by themselves.";
    } catch {
      note.classList.add("lost");
      note.textContent = "The server does not answer: this is how it was.";
    }
    await new Promise((done) => setTimeout(done, 1500));
  }
}

prepare();
if ("live" in document.body.dataset) watch();
