// A panel shows HTML that Python wrote, in places that change one by one; a control with a name holds the trait of that
// name ("frequency.3": the fourth of a list). data-press calls press_NAME in Python, data-set="NAME=JSON" sets a trait,
// data-pick is one of a list of choices, data-cell a pixel to draw; data-time and data-play move films without the kernel.
const MILLISECONDS = 130; // of a frame

const value = (node) => {
  if (node.type === "checkbox") return node.checked;
  if (node.type === "range" || node.type === "number") return Number(node.value);
  return node.tagName === "SELECT" ? JSON.parse(node.value) : node.value;
};
const typed = (node) => node.type === "text" || node.type === "number" || node.type === "search";
const mark = ({ name, dataset }) => name || dataset?.set || dataset?.pick || (dataset?.press && dataset.press + dataset.value);

function render({ model, el }) {
  const root = document.createElement("div");
  root.className = "funlora funlora-panel";
  root.tabIndex = -1; // a click beside a control keeps the focus in here
  // JupyterLab's single keys act on the cell around this panel unless the focused element itself says no
  root.addEventListener("focusin", ({ target }) => target.setAttribute("data-lm-suppress-shortcuts", "true"));
  el.append(root);
  const bound = new Set(); // traits that are listened to
  let playing = 0, paint = true;

  const change = (name, next) => { model.set(name, next); model.save_changes(); };
  const words = (node) => { if (node.nextElementSibling?.tagName === "OUTPUT") node.nextElementSibling.value = (+node.value).toFixed(node.step < 1 ? 2 : 0); };

  function fill(part, only) { // only the controls of one trait, lest what is being typed elsewhere is lost
    for (const node of part.querySelectorAll("[name]:not([type=file])")) {
      const [name, index] = node.name.split(".");
      bind(name);
      if (only && name !== only) continue;
      const held = index === undefined ? model.get(name) : model.get(name)[index];
      if (held === undefined) continue;
      if (node.type === "checkbox") node.checked = held;
      else if (node.tagName === "SELECT") node.value = [...node.options].map((o) => o.value).find((v) => v === JSON.stringify(held)) ?? "";
      else node.value = held;
      if (node.type === "range") words(node);
    }
    for (const node of part.querySelectorAll("[data-pick]")) {
      const [name, item] = node.dataset.pick.split("=");
      bind(name);
      if (only && name !== only) continue;
      node.checked = model.get(name).map((x) => JSON.stringify(x)).includes(item);
    }
    if (part.querySelector("[data-cell]")) bind("pixels");
    for (const node of part.querySelectorAll("[data-cell]")) node.ariaPressed = String(!!model.get("pixels")[node.dataset.cell]);
    for (const node of only ? [] : part.querySelectorAll("[data-time]")) frame(node.value);
  }

  function place(node) {
    const held = node.contains(document.activeElement) ? mark(document.activeElement) : null;
    const open = [...node.querySelectorAll("details")].map((one) => one.open);
    const scrolled = [...node.querySelectorAll(".scrolls")].map((one) => one.scrollTop);
    bind(node.dataset.place);
    node.innerHTML = model.get(node.dataset.place);
    node.querySelectorAll("details").forEach((one, i) => { one.open = open[i] ?? one.open; });
    node.querySelectorAll(".scrolls").forEach((one, i) => { one.scrollTop = scrolled[i] ?? 0; });
    fill(node);
    if (held === null) return;
    const again = [...node.querySelectorAll("[name],[data-set],[data-pick],[data-press]")].find((one) => mark(one) === held);
    (again ?? root).focus({ preventScroll: true });
  }

  function body() {
    root.innerHTML = model.get("body");
    fill(root);
    root.querySelectorAll("[data-place]").forEach(place);
  }

  function frame(time) {
    root.style.setProperty("--time", time);
    root.querySelectorAll("[data-time]").forEach((node) => { node.value = time; words(node); });
  }

  function play(button) {
    const stop = () => { clearInterval(playing); playing = 0; button.textContent = "Play"; };
    if (playing) return stop();
    const slider = root.querySelector("[data-time]"), last = Number(slider.max);
    if (Number(slider.value) >= last) frame(0);
    button.textContent = "Pause";
    playing = setInterval(() => {
      const next = Number(slider.value) + Number(slider.step);
      frame(Math.min(next, last));
      if (next >= last) stop();
    }, MILLISECONDS);
  }

  async function press(node) {
    const { press: name, value: given = "" } = node.dataset;
    const file = node.type === "file" && node.files[0];
    model.send({ press: name, value: file ? file.name : given }, undefined, file ? [await file.arrayBuffer()] : []);
    if (file) node.value = "";
  }

  function cell(node, lit) {
    node.ariaPressed = String(lit);
    change("pixels", [...root.querySelectorAll("[data-cell]")].map((one) => one.ariaPressed === "true"));
  }

  function changed({ target: node, type }) {
    if (node.dataset.time !== undefined) return frame(node.value);
    if (node.dataset.pick) {
      const [name, item] = node.dataset.pick.split("="), rest = model.get(name).filter((x) => JSON.stringify(x) !== item);
      return type === "input" && change(name, node.checked ? [...rest, JSON.parse(item)] : rest);
    }
    if (node.type === "file") return type === "change" && press(node);
    if (!node.name || (type === "input") === (typed(node) && !node.matches("[type=search]"))) return;
    if (type === "change" && !typed(node)) return;
    const [name, index] = node.name.split(".");
    if (node.type === "range") words(node);
    if (index === undefined) return change(name, value(node));
    change(name, model.get(name).map((old, i) => (i === Number(index) ? value(node) : old)));
  }

  function clicked(event) {
    const node = event.target.closest("[data-press],[data-set],[data-play],[data-cell]");
    if (!node || !root.contains(node) || node.disabled || node.type === "file") return;
    if (node.dataset.play !== undefined) play(node);
    else if (node.dataset.press) press(node);
    else if (node.dataset.set) {
      const [name, ...rest] = node.dataset.set.split("=");
      change(name, JSON.parse(rest.join("=")));
    } else if (event.detail === 0) cell(node, node.ariaPressed !== "true"); // by the keyboard; else painted below
  }

  root.addEventListener("input", changed);
  root.addEventListener("change", changed);
  root.addEventListener("click", clicked);
  root.addEventListener("keydown", (event) => {
    const node = event.target, step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: root.dataset.width ?? 8, ArrowUp: -(root.dataset.width ?? 8) };
    if (["Enter", " "].includes(event.key) && node.getAttribute("role") && node.tagName !== "BUTTON" && node.closest("svg")) {
      event.preventDefault();
      clicked(event);
    }
    if (event.key === "Enter" && typed(node)) changed({ target: node, type: node.type === "search" ? "input" : "change" });
    if (node.dataset?.cell !== undefined && event.key in step) {
      event.preventDefault();
      root.querySelector(`[data-cell="${Number(node.dataset.cell) + Number(step[event.key])}"]`)?.focus();
    }
  });
  root.addEventListener("pointerdown", (event) => {
    if (event.target.dataset.cell === undefined) return;
    event.target.releasePointerCapture?.(event.pointerId);
    cell(event.target, (paint = event.target.ariaPressed !== "true"));
  });
  root.addEventListener("pointerover", (event) => {
    if (event.buttons & 1 && event.target.dataset.cell !== undefined) cell(event.target, paint);
  });
  function bind(name) {
    if (bound.has(name)) return;
    bound.add(name);
    model.on(`change:${name}`, () => {
      if (name === "body") return body();
      root.querySelectorAll(`[data-place="${name}"]`).forEach(place);
      fill(root, name);
    });
  }
  bind("body");
  const save = ({ save: name }, buffers) => { // a file that Python hands over
    if (!name) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(buffers));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  };
  model.on("msg:custom", save);
  body();
  return () => {
    model.off("msg:custom", save);
    clearInterval(playing);
    bound.forEach((name) => model.off(`change:${name}`));
  };
}

export default { render };
