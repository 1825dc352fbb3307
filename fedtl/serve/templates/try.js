
"use strict";
const kind = document.body.dataset.kind;
const at = (id) => document.getElementById(id);
const MOST = 20;
let asked = 0;

function complain(text) {
  at("found").hidden = true;
  at("error").textContent = text;
  at("error").hidden = false;
}

function show(prediction) {
  at("error").hidden = true;
  const share = (p) => (100 * p).toFixed(1) + " %";
  at("answer").textContent = prediction.label + ", " + share(prediction.probability);
  const rows = Object.entries(prediction.probabilities).sort((a, b) => b[1] - a[1]);
  at("bars").replaceChildren(...rows.slice(0, MOST).map(([label, p]) => {
    const row = document.createElement("li");
    for (const [part, text] of [["name", label], ["track", ""], ["share", share(p)]]) {
      const cell = document.createElement("span");
      cell.className = part;
      cell.textContent = text;
      row.append(cell);
    }
    const fill = document.createElement("div");
    fill.className = "fill";
    fill.style.width = 100 * p + "%";
    row.children[1].append(fill);
    row.children[1].setAttribute("aria-hidden", "true");
    return row;
  }));
  at("found").hidden = false;
}

async function ask(body, type) {
  const mine = ++asked;
  document.body.setAttribute("aria-busy", "true");
  if (at("go")) at("go").disabled = true;
  try {
    const answer = await fetch("/predict", {method: "POST", headers: {"Content-Type": type}, body});
    const told = await answer.json();
    if (mine !== asked) return;
    if (answer.ok) show(told.predictions[0]);
    else complain(["what", "allowed", "do"].map((k) => told.error[k]).filter(Boolean).join(". "));
  } catch (error) {
    if (mine === asked) complain("The server did not answer. Is it still running?");
  } finally {
    if (mine === asked) document.body.removeAttribute("aria-busy");
    if (at("go")) at("go").disabled = false;
  }
}

function picture(file) {
  if (!file) return;
  const image = at("picture");
  if (image.src) URL.revokeObjectURL(image.src);
  image.onload = () => { image.hidden = false; };
  image.onerror = () => { image.hidden = true; };
  image.src = URL.createObjectURL(file);
  ask(file, "application/octet-stream");
}

if (kind === "images") {
  const drop = at("drop");
  drop.addEventListener("click", () => at("file").click());
  at("file").addEventListener("change", () => { picture(at("file").files[0]); at("file").value = ""; });
  for (const name of ["dragover", "dragenter"]) {
    addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
  }
  addEventListener("dragleave", () => drop.classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    picture(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => picture(event.clipboardData.files[0]));
} else {
  const send = () => {
    const text = at("text").value;
    if (kind === "texts") return ask(JSON.stringify({texts: [text]}), "application/json");
    const row = text.split(/[\s,;]+/).filter(Boolean).map(Number);
    if (row.some(Number.isNaN)) return complain("Something in the row is no number.");
    ask(JSON.stringify({rows: [row]}), "application/json");
  };
  at("go").addEventListener("click", send);
  at("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
  });
}
