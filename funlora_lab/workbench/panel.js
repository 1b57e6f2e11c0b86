// A panel shows HTML that Python wrote, in places (data-place) that change one by one. A control bears the name of the
// trait that it holds ("frequency.3": the fourth of a list; a check box with a value: one of a list of numbers).
// data-press calls press_NAME in Python, data-cell is a pixel to draw, data-time and data-play move films in the page.
const MILLISECONDS = 130; // of a frame

const settled = ({ type }) => (type === "text" || type === "number" ? "change" : "input"); // the event that ends a change
const mark = (node) => ["name", "value", "data-press", "data-value"].map((key) => node.getAttribute(key)).join();
const say = (slider) => { slider.nextElementSibling.value = (+slider.value).toFixed(slider.step < 1 ? 2 : 0); };
const picks = (node) => node.type === "checkbox" && node.hasAttribute("value");

function value(node, held) {
  if (picks(node)) return [...held.filter((one) => one !== +node.value), ...(node.checked ? [+node.value] : [])];
  if (node.type === "checkbox") return node.checked;
  if (node.type === "range" || node.type === "number") return +node.value;
  return node.tagName === "SELECT" ? JSON.parse(node.value) : node.value;
}

function hold(node, held) {
  if (node.type === "checkbox") node.checked = picks(node) ? held.includes(+node.value) : held;
  else node.value = node.tagName === "SELECT" ? JSON.stringify(held) : held;
  if (node.type === "range") say(node);
}

function render({ model, el }) {
  const root = document.createElement("div");
  root.className = "funlora funlora-panel";
  root.tabIndex = -1; // a click beside a control keeps the focus in here
  // JupyterLab's single keys act on the cell around this panel unless the focused element itself says no
  root.addEventListener("focusin", ({ target }) => target.setAttribute("data-lm-suppress-shortcuts", "true"));
  el.append(root);
  const bound = new Set(); // traits that are listened to
  let playing = 0, paint = true;

  const all = (selector, part = root) => [...part.querySelectorAll(selector)];
  const change = (name, next) => { model.set(name, next); model.save_changes(); };

  function fill(part, only) { // only the controls of one trait, lest what is being typed elsewhere is lost
    for (const node of all("[name]:not([type=file])", part)) {
      const [name, index] = node.name.split(".");
      bind(name);
      const held = index ? model.get(name)[index] : model.get(name);
      if ((!only || name === only) && held !== undefined) hold(node, held);
    }
    for (const node of all("[data-cell]", part)) {
      bind("pixels");
      node.ariaPressed = String(model.get("pixels")[node.dataset.cell]);
    }
    if (!only) all("[data-time]", part).forEach((node) => frame(node.value));
  }

  function place(node) {
    const focused = node.contains(document.activeElement) ? mark(document.activeElement) : null;
    const scrolled = all(".scrolls", node).map((one) => one.scrollTop);
    bind(node.dataset.place);
    node.innerHTML = model.get(node.dataset.place);
    all(".scrolls", node).forEach((one, i) => { one.scrollTop = scrolled[i] ?? 0; });
    fill(node);
    if (focused === null) return;
    (all("[name],[data-press]", node).find((one) => mark(one) === focused) ?? root).focus({ preventScroll: true });
  }

  function body() {
    root.innerHTML = model.get("body");
    fill(root);
    all("[data-place]").forEach(place);
  }

  function bind(name) {
    if (bound.has(name)) return;
    bound.add(name);
    model.on(`change:${name}`, () => {
      if (name === "body") return body();
      all(`[data-place="${name}"]`).forEach(place);
      fill(root, name);
    });
  }

  function frame(time) {
    root.style.setProperty("--time", time);
    all("[data-time]").forEach((node) => { node.value = time; say(node); });
  }

  function play(button) {
    const stop = () => { clearInterval(playing); playing = 0; button.textContent = "Play"; };
    if (playing) return stop();
    const slider = root.querySelector("[data-time]"), last = +slider.max;
    if (+slider.value >= last) frame(0);
    button.textContent = "Pause";
    playing = setInterval(() => {
      const next = +slider.value + +slider.step;
      frame(Math.min(next, last));
      if (next >= last) stop();
    }, MILLISECONDS);
  }

  async function press(node) {
    const file = node.type === "file" && node.files[0];
    const sent = { press: node.dataset.press, value: file ? file.name : node.dataset.value ?? "" };
    model.send(sent, undefined, file ? [await file.arrayBuffer()] : []);
    if (file) node.value = "";
  }

  function light(cell, lit) {
    cell.ariaPressed = String(lit);
    change("pixels", all("[data-cell]").map((one) => one.ariaPressed === "true"));
  }

  function changed({ target: node, type }) {
    if (node.dataset.time !== undefined) return frame(node.value);
    if (type !== settled(node)) return;
    if (node.type === "file") return press(node);
    const [name, index] = node.name.split("."), held = model.get(name);
    if (node.type === "range") say(node);
    change(name, index ? held.map((old, i) => (i === +index ? value(node) : old)) : value(node, held));
  }

  function clicked(event) {
    const node = event.target.closest("[data-press],[data-play],[data-cell]");
    if (!node || node.type === "file") return;
    if (node.dataset.play !== undefined) play(node);
    else if (node.dataset.press) press(node);
    else if (event.detail === 0) light(node, node.ariaPressed !== "true"); // by the keyboard; else painted below
  }

  function key(event) {
    const node = event.target, { cell } = node.dataset;
    if (["Enter", " "].includes(event.key) && node.closest("svg")) { // a button drawn in SVG
      event.preventDefault();
      clicked(event);
    }
    if (event.key === "Enter" && settled(node) === "change") changed({ target: node, type: "change" });
    const across = Math.sqrt(all("[data-cell]").length);
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across }[event.key];
    if (cell === undefined || !step) return;
    event.preventDefault();
    root.querySelector(`[data-cell="${+cell + step}"]`)?.focus();
  }

  function painted({ type, target: cell, buttons, pointerId }) { // a stroke sets all its pixels as it sets the first
    if (cell.dataset.cell === undefined || !(buttons & 1)) return;
    if (type === "pointerdown") {
      cell.releasePointerCapture(pointerId);
      paint = cell.ariaPressed !== "true";
    }
    light(cell, paint);
  }

  function save({ save: name }, buffers) { // a file that Python hands over
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(buffers));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  }

  const listeners = { input: changed, change: changed, click: clicked, keydown: key, pointerdown: painted, pointerover: painted };
  Object.entries(listeners).forEach(([event, act]) => root.addEventListener(event, act));
  model.on("msg:custom", save);
  bind("body");
  body();
  return () => {
    model.off("msg:custom", save);
    clearInterval(playing);
    bound.forEach((name) => model.off(`change:${name}`));
  };
}

export default { render };
