// The live view's front end: plain DOM, SVG and one canvas; no library, no address, no build step.
//
// Theory of operation. The model holds two traits, both made in Python (gostore/viz/scene.py) and ready to draw:
//   picture  names, words, colours, places; the gauges' points and the ticker's lines; changes about once a second,
//            and at once when a node's state changes
//   ring     the token arcs; large, and changes with the epoch only
// and a stream of custom messages {type: "tick", pulses: [[from, to, kind, count]...], lines: [...]} ten times a second.
// Whoever opens the page late needs the traits alone; a lost tick costs a few pulses, never a state.
//
// What is drawn where: the SVG holds what stands still (ring, links, nodes; all elements are kept and updated in place),
// the canvas above it what moves (pulses), so that 60 frames a second repaint no SVG. Every panel has its size before
// data arrive: nothing jumps. The consensus groups stand below: a row each, in an order that never changes, and a cell per
// replica that is its own bar; what is new (a term, a snapshot) is told from the picture before, and marked for a while.
// All text is set with textContent. This stays one file, although it is long: anywidget loads one module from a blob,
// which cannot import a neighbour.

const SVG = "http://www.w3.org/2000/svg";
const BAND = 13; // width of the ring, pixels
const ON_RING_MIN = 31; // from so many nodes on they sit on the ring itself
const MESH_MAX = 8; // up to so many nodes, idle links are drawn too
const PULSES_MAX = 160; // moving at a time
const PULSE_EVERY_MS = 170; // per link, direction and kind: faster than the eye says nothing, the link's width tells
const SENT_MAX = 4000; // links whose last pulse is remembered
const MOVED_MS = 6000; // how long the ranges that changed hands stay marked
const NEWS_MS = 5000; // silence that is worth saying
const ASK_MS = 1500; // how long an answer may take before it is said why
const LINES_MAX = 60;
const INSTALLED_MS = 4000; // how long a replica shows that it has installed a snapshot
const KINDS = ["call", "copy", "gossip", "drop"];
const CLIENT = "client";

// -- small helpers

function make(space, tag, attributes = {}, ...children) {
  const node = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const html = (tag, attributes, ...children) => make(null, tag, attributes, ...children);
const svg = (tag, attributes, ...children) => make(SVG, tag, attributes, ...children);

function put(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    const text = String(value);
    if (node.getAttribute(name) !== text) node.setAttribute(name, text);
  }
}
function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}
const at = (x, y, radius, turn) => [
  x + radius * Math.sin(2 * Math.PI * turn),
  y - radius * Math.cos(2 * Math.PI * turn),
];
const pairKey = (a, b) => (a < b ? `${a}\n${b}` : `${b}\n${a}`);
const px = (number) => number.toFixed(1);

function arcPath(x, y, inner, outer, start, width) {
  width = Math.min(width, 0.9995); // a whole turn would end where it starts, and not be drawn
  const large = width > 0.5 ? 1 : 0;
  const [x1, y1] = at(x, y, outer, start);
  const [x2, y2] = at(x, y, outer, start + width);
  const [x3, y3] = at(x, y, inner, start + width);
  const [x4, y4] = at(x, y, inner, start);
  return (
    `M${px(x1)} ${px(y1)}A${outer} ${outer} 0 ${large} 1 ${px(x2)} ${px(y2)}` +
    `L${px(x3)} ${px(y3)}A${inner} ${inner} 0 ${large} 0 ${px(x4)} ${px(y4)}Z`
  );
}

// Arcs [start, width, owner...] whose neighbours agree on `value` made one: [start, width, value].
function merge(arcs, value) {
  const out = [];
  for (const arc of arcs) {
    const [start, width] = arc;
    const last = out[out.length - 1];
    const v = value(arc);
    if (last && last[2] === v && Math.abs(last[0] + last[1] - start) < 1e-6) last[1] += width;
    else out.push([start, width, v]);
  }
  return out;
}

// The arc that holds a turn (0..1); the last may wrap around.
function arcAt(arcs, turn) {
  for (const arc of arcs) {
    const offset = (((turn - arc[0]) % 1) + 1) % 1;
    if (offset < arc[1]) return arc;
  }
  return null;
}

// The pieces of the new ring whose first owner is not the old ring's: [start, width, new first owner's id].
function movedRanges(old, now) {
  if (!old || !old.arcs.length || !now.arcs.length) return [];
  const cuts = [...old.arcs, ...now.arcs].map((arc) => arc[0]).sort((a, b) => a - b);
  const moved = [];
  for (let i = 0; i < cuts.length; i++) {
    const width = i + 1 < cuts.length ? cuts[i + 1] - cuts[i] : 1 - cuts[i] + cuts[0];
    if (width < 1e-7) continue;
    const middle = (cuts[i] + width / 2) % 1;
    const before = arcAt(old.arcs, middle);
    const after = arcAt(now.arcs, middle);
    if (before && after && old.owners[before[2]] !== now.owners[after[2]])
      moved.push([cuts[i], width, now.owners[after[2]]]);
  }
  return merge(moved, (piece) => piece[2]);
}

// -- the stage: ring, links, nodes, pulses

class Stage {
  constructor(root, onSelect) {
    this.root = root;
    this.onSelect = onSelect;
    this.nodes = new Map(); // id -> {data, parts, x, y, r}
    this.links = new Map(); // pair -> {a, b, line, rates, seen}
    this.fixed = []; // edges of a graph, faults of a cluster
    this.pulses = [];
    this.sent = new Map(); // link, direction and kind -> when its last pulse left
    this.spread = 0;
    this.ring = { owners: [], arcs: [] };
    this.moved = [];
    this.selected = null;
    this.hovered = null;
    this.asked = null;
    this.width = 0;
    this.height = 0;
    this.frame = 0;
    this.still = matchMedia("(prefers-reduced-motion: reduce)");

    this.layers = {};
    this.svg = svg("svg", { class: "gs-svg", role: "group" });
    for (const name of ["ring", "moved", "held", "links", "faults", "mark", "client", "nodes"]) {
      this.layers[name] = svg("g", { class: `gs-${name}` });
      this.svg.append(this.layers[name]);
    }
    this.canvas = html("canvas", { class: "gs-canvas", "aria-hidden": "true" });
    this.tip = html("div", { class: "gs-tip", role: "tooltip", hidden: "" });
    this.element = html("div", { class: "gs-stage" }, this.svg, this.canvas, this.tip);
    this.layers.client.append(
      svg("rect", { x: 12, y: 14, width: 74, height: 24, rx: 6 }),
      svg("text", { x: 49, y: 30, "text-anchor": "middle" }, "clients"),
    );
    this.layers.client.setAttribute("visibility", "hidden");
    this.svg.addEventListener("pointermove", (event) => this.hoverRing(event));
    this.svg.addEventListener("pointerleave", () => this.hover(null));
    this.svg.addEventListener("click", (event) => {
      if (!event.target.closest(".gs-node")) this.onSelect(null);
    });
  }

  // Everything that depends on the size; called when the stage is resized and when nodes come or go.
  layout() {
    const box = this.element.getBoundingClientRect();
    this.width = Math.max(box.width, 240);
    this.height = Math.max(box.height, 240);
    put(this.svg, { width: this.width, height: this.height, viewBox: `0 0 ${this.width} ${this.height}` });
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = this.width * ratio;
    this.canvas.height = this.height * ratio;
    this.canvas.style.width = `${this.width}px`;
    this.canvas.style.height = `${this.height}px`;
    this.pen = this.canvas.getContext("2d");
    this.pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.readColors();

    const count = this.nodes.size;
    const cluster = this.mode === "cluster";
    const ringed = cluster || this.ring.arcs.length > 0;
    this.onRing = ringed && count >= ON_RING_MIN;
    this.cx = this.width / 2;
    this.cy = this.height / 2;
    // Outside the ring: the mark of what moved, and on a large ring the names.
    this.svg.classList.toggle("gs-many", cluster && count > MESH_MAX);
    this.outer = Math.min(this.width, this.height) / 2 - (this.onRing ? 34 : 18);
    const reach = this.onRing ? this.outer - BAND / 2 : ringed ? this.outer * 0.68 : this.outer - 24;
    // A force layout has no shape to keep: it takes the room there is.
    const [reachX, reachY] = this.stretch ? [this.width / 2 - 42, this.height / 2 - 42] : [reach, reach];
    this.gap = (2 * Math.PI * reach) / Math.max(count, 1);
    this.disc = Math.min(28, this.gap * (this.onRing ? 0.3 : 0.38));
    if (!ringed) this.disc = Math.max(6, Math.min(26, (0.42 * this.outer) / Math.sqrt(count || 1)));
    for (const node of this.nodes.values()) {
      node.x = this.cx + node.data.x * reachX;
      node.y = this.cy + node.data.y * reachY;
      node.r = this.disc;
      this.drawNode(node);
    }
    this.drawRing();
    this.drawFixed();
    this.drawLinks();
    this.drawMark();
    this.pulses.length = 0;
  }

  readColors() {
    const style = getComputedStyle(this.root);
    this.colors = Object.fromEntries(KINDS.map((kind) => [kind, style.getPropertyValue(`--gs-${kind}`).trim()]));
    this.paper = style.getPropertyValue("--gs-paper").trim() || "#fff";
  }

  apply(picture) {
    this.mode = picture.mode;
    this.stretch = picture.stretch === true;
    const before = [...this.nodes.keys()].join("\n");
    const known = new Set(picture.nodes.map((node) => node.id));
    for (const [id, node] of this.nodes) {
      if (!known.has(id)) {
        node.parts.group.remove();
        this.nodes.delete(id);
      }
    }
    let moved = false;
    for (const data of picture.nodes) {
      const node = this.nodes.get(data.id);
      if (node) {
        moved ||= node.data.x !== data.x || node.data.y !== data.y;
        node.data = data;
      } else this.addNode(data);
    }
    for (const [key, link] of this.links) {
      if (!this.place(link.a) || !this.place(link.b)) {
        link.line.remove();
        this.links.delete(key);
      }
    }
    const edges = JSON.stringify(picture.links);
    const same = edges === this.edges;
    this.edges = edges;
    this.fixed = picture.links;
    this.tokens = picture.mark;
    if (moved || before !== [...this.nodes.keys()].join("\n") || !this.width) {
      this.mesh();
      if (this.element.isConnected) this.layout();
    } else {
      for (const node of this.nodes.values()) this.drawNode(node);
      if (!same) this.drawFixed();
    }
    const kind = picture.mode === "cluster" ? "Ring" : "Graph";
    put(this.svg, { "aria-label": `${kind} of ${picture.nodes.length} nodes` });
    this.drawMark();
    this.roving();
  }

  setRing(ring) {
    const moved = movedRanges(this.ring, ring);
    this.ring = ring;
    if (moved.length) {
      this.moved = moved;
      this.movedUntil = performance.now() + MOVED_MS;
      clearTimeout(this.movedTimer);
      this.movedTimer = setTimeout(() => {
        this.moved = [];
        this.drawMoved();
      }, MOVED_MS);
    }
    if (this.width) this.drawRing();
  }

  // -- nodes

  addNode(data) {
    const parts = {
      halo: svg("circle", { class: "gs-halo" }),
      crown: svg("circle", { class: "gs-crown" }),
      disc: svg("circle", { class: "gs-disc" }),
      name: svg("text", { class: "gs-name", "text-anchor": "middle" }),
      state: svg("text", { class: "gs-state", "text-anchor": "middle" }),
      rank: svg("g", { class: "gs-rank" }, svg("circle", { r: 9 }), svg("text", { "text-anchor": "middle", y: 4 })),
    };
    parts.group = svg("g", { class: "gs-node", role: "button", "data-node": data.id }, ...Object.values(parts));
    const node = { data, parts, x: 0, y: 0, r: 20 };
    this.nodes.set(data.id, node);
    this.layers.nodes.append(parts.group);
    parts.group.addEventListener("click", () => this.onSelect(this.selected === data.id ? null : data.id));
    parts.group.addEventListener("pointerenter", () => this.hover(data.id));
    parts.group.addEventListener("pointerleave", () => this.hover(null));
    parts.group.addEventListener("focus", () => this.hover(data.id));
    parts.group.addEventListener("blur", () => this.hover(null));
    parts.group.addEventListener("keydown", (event) => this.key(event, data.id));
  }

  key(event, id) {
    const ids = [...this.nodes.keys()];
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step) {
      this.focusId = ids[(ids.indexOf(id) + step + ids.length) % ids.length];
      this.roving();
      this.nodes.get(this.focusId).parts.group.focus();
    } else if (event.key === "Enter" || event.key === " ") this.onSelect(this.selected === id ? null : id);
    else if (event.key === "Escape") this.onSelect(null);
    else return;
    event.preventDefault();
  }

  // One node takes part in the page's tab order; the arrow keys go on from it.
  roving() {
    if (!this.nodes.has(this.focusId)) this.focusId = this.nodes.keys().next().value;
    for (const [id, node] of this.nodes) put(node.parts.group, { tabindex: id === this.focusId ? 0 : -1 });
  }

  drawNode(node) {
    const { data, parts, x, y, r } = node;
    const id = data.id;
    put(parts.group, {
      transform: `translate(${px(x)} ${px(y)})`,
      "data-look": data.look,
      "aria-label": [data.label, data.state, data.master ? "master" : ""].filter(Boolean).join(", "),
      "aria-pressed": this.selected === id,
    });
    parts.group.style.setProperty("--c", data.color);
    parts.group.classList.toggle("gs-selected", this.selected === id);
    parts.group.classList.toggle("gs-small", r < 14);
    put(parts.disc, { r: px(r) });
    put(parts.halo, { r: px(r + 9) });
    put(parts.crown, { r: px(r + 5), visibility: data.master ? "inherit" : "hidden" });
    say(parts.name, data.label);
    say(parts.state, data.state);
    this.placeLabel(node);
    const rank = this.asked ? this.asked.indexOf(id) : -1;
    parts.group.classList.toggle("gs-asked", rank >= 0);
    parts.group.classList.toggle("gs-aside", this.asked !== null && rank < 0);
    put(parts.rank, { transform: `translate(${px(r * 0.8)} ${px(-r * 0.8)})`, visibility: rank >= 0 ? "inherit" : "hidden" });
    say(parts.rank.lastChild, String(rank + 1));
  }

  // Inside the disc where it fits, outside the ring on a large one, below the disc otherwise.
  placeLabel({ data, parts, r }) {
    const inside = !this.onRing && data.label.length * 7.2 < 2 * r - 5;
    const two = inside && r >= 23 && data.state.length * 5.7 < 2 * r - 1;
    const calm = data.look === "ok";
    let name = { x: 0, y: two ? 0 : 4, "text-anchor": "middle" };
    // Outwards from the middle there is room.
    const length = Math.hypot(data.x, data.y);
    const [ux, uy] = length > 0.1 ? [data.x / length, data.y / length] : [0, 1];
    const anchor = Math.abs(ux) < 0.3 ? "middle" : ux > 0 ? "start" : "end";
    const outside = { x: px(ux * (r + 6)), y: px(uy * (r + 11) + 4), "text-anchor": anchor };
    let state = two ? { x: 0, y: 14, "text-anchor": "middle" } : outside;
    if (!inside && this.onRing) name = outside;
    else if (!inside) {
      name.y = -r - 5;
      if (!two) state = { x: 0, y: r + 13, "text-anchor": "middle" };
    }
    const wanted = this.hovered === data.id || this.selected === data.id;
    const crowded = this.onRing ? this.gap < 26 : !inside && r < 9;
    put(parts.name, { ...name, visibility: crowded && calm && !wanted ? "hidden" : "inherit" });
    put(parts.state, { ...state, visibility: two || (!calm && !this.onRing) ? "inherit" : "hidden" });
    parts.state.classList.toggle("gs-outside", !two);
    parts.name.classList.toggle("gs-outside", !inside);
  }

  place(id) {
    return this.nodes.get(id) ?? (id === CLIENT ? { x: 86, y: 26, r: 4 } : undefined);
  }

  // -- ring

  drawRing() {
    this.drawBand(this.layers.ring, this.outer - BAND, this.outer, merge(this.ring.arcs, (arc) => arc[2]), true);
    this.drawMoved();
    this.drawHeld();
  }

  drawBand(layer, inner, outer, pieces, named) {
    const paths = new Map();
    for (const [start, width, owner] of pieces) {
      const gap = Math.min(0.9 / (2 * Math.PI * outer), width * 0.25);
      const path = arcPath(this.cx, this.cy, inner, outer, start + gap / 2, width - gap);
      paths.set(owner, (paths.get(owner) || "") + path);
    }
    const old = new Map([...layer.children].map((path) => [path.dataset.owner, path]));
    for (const [owner, d] of paths) {
      const id = typeof owner === "number" ? this.ring.owners[owner] : owner;
      let path = old.get(id);
      if (!path) {
        path = svg("path", { "data-owner": id });
        layer.append(path);
      }
      old.delete(id);
      put(path, { d });
      path.style.setProperty("--c", this.nodes.get(id)?.data.color || "var(--gs-gone)");
      if (named) path.classList.toggle("gs-dim", this.focused() !== null && this.focused() !== id);
    }
    for (const path of old.values()) path.remove();
  }

  drawMoved() {
    this.drawBand(this.layers.moved, this.outer + 4, this.outer + 9, this.moved, false);
  }

  focused() {
    return this.hovered ?? this.selected;
  }

  // Inside the ring, what the hovered or selected node holds as a replica: the fainter, the later in the list.
  drawHeld() {
    const id = this.focused();
    const index = this.ring.owners.indexOf(id);
    const pieces = index < 0 ? [] : this.ring.arcs.filter((arc) => arc.indexOf(index, 3) > 0);
    this.drawBand(this.layers.held, this.outer - BAND - 8, this.outer - BAND - 4, merge(pieces, () => id), false);
    for (const path of this.layers.ring.children)
      path.classList.toggle("gs-dim", id !== null && index >= 0 && path.dataset.owner !== id);
  }

  hover(id) {
    if (this.hovered === id) return;
    this.hovered = id;
    this.asked = this.tokens?.owners || null;
    this.drawHeld();
    for (const node of this.nodes.values()) this.drawNode(node);
    if (id === null) this.tip.hidden = true;
    else {
      const node = this.nodes.get(id);
      const words = [node.data.label, node.data.state].filter(Boolean).join(" · ");
      this.showTip(node.x, node.y - node.r - 10, words);
    }
  }

  hoverRing(event) {
    if (!this.ring.arcs.length || event.target.closest(".gs-node")) return;
    const box = this.svg.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const distance = Math.hypot(x - this.cx, y - this.cy);
    const inside = distance > this.outer - BAND - 3 && distance < this.outer + 3;
    const turn = (Math.atan2(x - this.cx, this.cy - y) / (2 * Math.PI) + 1) % 1;
    const arc = inside ? arcAt(this.ring.arcs, turn) : null;
    const owners = arc ? arc.slice(2).map((index) => this.ring.owners[index]) : this.tokens?.owners || null;
    if (String(owners) !== String(this.asked)) {
      this.asked = owners;
      for (const node of this.nodes.values()) this.drawNode(node);
    }
    if (!arc) {
      if (this.hovered === null) this.tip.hidden = true;
      return;
    }
    const token = Math.floor(turn * 65536).toString(16).padStart(4, "0");
    this.showTip(x, y - 12, `tokens near 0x${token}… → ${owners.join(", ")}`);
  }

  showTip(x, y, words) {
    say(this.tip, words);
    this.tip.hidden = false;
    const half = this.tip.offsetWidth / 2;
    this.tip.style.left = `${Math.max(half + 4, Math.min(x, this.width - half - 4))}px`;
    this.tip.style.top = `${Math.max(y, this.tip.offsetHeight + 4)}px`;
  }

  // The key that was asked for: ticks on the ring, a dotted line to each replica.
  drawMark() {
    const layer = this.layers.mark;
    layer.replaceChildren();
    this.asked = this.tokens?.owners || null;
    if (this.width && this.tokens && this.ring.arcs.length) {
      for (const { turn, owners, main } of this.tokens.ticks) {
        const [x1, y1] = at(this.cx, this.cy, this.outer - BAND - 5, turn);
        const [x2, y2] = at(this.cx, this.cy, this.outer + (main ? 8 : 4), turn);
        if (main) {
          for (const id of owners) {
            const node = this.nodes.get(id);
            if (node) layer.append(svg("path", { class: "gs-thread", d: `M${px(x1)} ${px(y1)}L${px(node.x)} ${px(node.y)}` }));
          }
        }
        layer.append(svg("path", { class: main ? "gs-tick" : "gs-tick gs-minor", d: `M${px(x1)} ${px(y1)}L${px(x2)} ${px(y2)}` }));
      }
    }
    for (const node of this.nodes.values()) this.drawNode(node);
  }

  // -- links

  // Up to a few nodes every pair has its line, also when it is silent.
  mesh() {
    if (this.mode !== "cluster" || this.nodes.size > MESH_MAX) return;
    const ids = [...this.nodes.keys()];
    ids.forEach((a, i) => ids.slice(i + 1).forEach((b) => this.link(a, b)));
  }

  link(a, b) {
    const key = pairKey(a, b);
    let link = this.links.get(key);
    if (!link) {
      link = { a, b, line: svg("path", { class: "gs-link" }), rates: Object.fromEntries(KINDS.map((kind) => [kind, 0])) };
      this.links.set(key, link);
      this.layers.links.append(link.line);
      put(link.line, { d: this.curveText(a, b) });
    }
    return link;
  }

  // A quadratic curve from disc to disc, bent towards the centre; on a large ring more, which bundles them.
  curve(a, b, aside = 0) {
    const [from, to] = [this.place(a), this.place(b)];
    if (!from || !to || from === to) return null;
    const bend = this.mode !== "cluster" || a === CLIENT || b === CLIENT ? 0 : this.onRing ? 0.75 : 0.14;
    const mx = (from.x + to.x) / 2;
    const my = (from.y + to.y) / 2;
    const kx = mx + (this.cx - mx) * bend + (to.y - from.y) * aside;
    const ky = my + (this.cy - my) * bend - (to.x - from.x) * aside;
    const first = Math.hypot(kx - from.x, ky - from.y) || 1;
    const last = Math.hypot(to.x - kx, to.y - ky) || 1;
    return [
      from.x + ((kx - from.x) * from.r) / first,
      from.y + ((ky - from.y) * from.r) / first,
      kx,
      ky,
      to.x - ((to.x - kx) * to.r) / last,
      to.y - ((to.y - ky) * to.r) / last,
    ];
  }

  curveText(a, b) {
    const curve = this.width ? this.curve(a, b) : null;
    if (!curve) return "";
    const [x1, y1, kx, ky, x2, y2] = curve.map(px);
    return `M${x1} ${y1}Q${kx} ${ky} ${x2} ${y2}`;
  }

  drawLinks() {
    for (const link of this.links.values()) put(link.line, { d: this.curveText(link.a, link.b) });
  }

  // Rates fade with a half-life of a second; called every 250 ms.
  fade() {
    for (const [key, link] of this.links) {
      let total = 0;
      let busiest = null;
      for (const kind of KINDS) {
        const rate = (link.rates[kind] *= 0.84);
        total += rate;
        if (rate > 0.05 && (busiest === null || rate > link.rates[busiest])) busiest = kind;
      }
      if (busiest === null && (this.nodes.size > MESH_MAX || link.a === CLIENT || link.b === CLIENT)) {
        link.line.remove();
        this.links.delete(key);
        continue;
      }
      const quiet = this.onRing ? 0.4 : this.nodes.size > MESH_MAX ? 0.6 : 1;
      put(link.line, {
        "data-kind": busiest || "idle",
        "stroke-width": (busiest ? quiet * Math.min(0.8 + 0.45 * Math.log2(1 + total), 5) : 1).toFixed(2),
      });
    }
  }

  drawFixed() {
    const layer = this.layers.faults;
    layer.replaceChildren();
    const pairs = new Set(this.fixed.map((edge) => `${edge.a}\n${edge.b}`));
    for (const edge of this.fixed) {
      const both = edge.look === "edge" && edge.directed && pairs.has(`${edge.b}\n${edge.a}`);
      const curve = this.curve(edge.a, edge.b, both ? 0.09 : 0);
      if (!curve) continue;
      const [x1, y1, kx, ky, x2, y2] = curve;
      const line = svg("path", { class: `gs-${edge.look}`, d: `M${px(x1)} ${px(y1)}Q${px(kx)} ${px(ky)} ${px(x2)} ${px(y2)}` });
      line.append(svg("title", {}, `${edge.a} → ${edge.b}${edge.label ? `: ${edge.label}` : ""}`));
      layer.append(line);
      if (edge.look === "blocked") {
        // Nearer to the receiver: a link cut both ways shows two crosses, one cut one way shows which.
        const [x, y] = point(curve, 0.66);
        layer.append(svg("path", { class: "gs-cross", d: `M${px(x - 5)} ${px(y - 5)}l10 10m-10 0l10 -10` }));
      }
      if (edge.look === "edge") this.drawEdge(layer, line, edge, curve);
    }
  }

  drawEdge(layer, line, edge, curve) {
    const [, , kx, ky, x2, y2] = curve;
    put(line, { "stroke-width": edge.width, ...(edge.dashed ? { "stroke-dasharray": "5 4" } : {}) });
    if (edge.color) line.style.stroke = edge.color;
    if (edge.directed) {
      const length = Math.hypot(x2 - kx, y2 - ky) || 1;
      const [ux, uy] = [(x2 - kx) / length, (y2 - ky) / length];
      const tip = svg("path", {
        class: "gs-tip-of-edge",
        d: `M${px(x2)} ${px(y2)}L${px(x2 - 9 * ux - 4 * uy)} ${px(y2 - 9 * uy + 4 * ux)}L${px(x2 - 9 * ux + 4 * uy)} ${px(y2 - 9 * uy - 4 * ux)}Z`,
      });
      if (edge.color) tip.style.fill = edge.color;
      layer.append(tip);
    }
    if (edge.label) {
      const [x, y] = point(curve, 0.5);
      layer.append(svg("text", { class: "gs-edge-label", x: px(x), y: px(y - 5), "text-anchor": "middle" }, edge.label));
    }
  }

  // -- pulses

  tick(pulses) {
    const now = performance.now();
    let sight = false;
    for (const [from, to, kind, count] of pulses) {
      const [a, b] = [from, to].map((id) => (this.nodes.has(id) ? id : CLIENT));
      if (a === b) continue;
      sight ||= a === CLIENT || b === CLIENT;
      // A drop belongs to the link, but does not widen it.
      if (kind !== "drop") this.link(a, b).rates[kind] += count;
      if (this.still.matches || document.hidden || !this.width) continue;
      const key = `${a}\n${b}\n${kind}`;
      if (now - (this.sent.get(key) ?? -Infinity) < PULSE_EVERY_MS || this.pulses.length >= PULSES_MAX) continue;
      const curve = this.curve(a, b);
      if (!curve) continue;
      this.sent.set(key, now);
      const length = Math.hypot(curve[4] - curve[0], curve[5] - curve[1]);
      // Spread over the tick: what happened within it did not happen at once.
      this.spread = (this.spread + 0.618) % 1;
      this.pulses.push({ curve, kind, start: now + 100 * this.spread, lasts: Math.max(300, Math.min(600, 260 + length)) });
    }
    if (this.sent.size > SENT_MAX) this.sent.clear();
    if (sight) put(this.layers.client, { visibility: "visible" });
    if (this.pulses.length && !this.frame) this.frame = requestAnimationFrame(() => this.draw());
  }

  draw() {
    const now = performance.now();
    const pen = this.pen;
    pen.clearRect(0, 0, this.width, this.height);
    this.pulses = this.pulses.filter((pulse) => now < pulse.start + pulse.lasts);
    for (const pulse of this.pulses) {
      if (now < pulse.start) continue;
      let along = (now - pulse.start) / pulse.lasts;
      pen.globalAlpha = Math.min(1, 8 * along, 6 * (1 - along));
      if (pulse.kind === "drop") along = Math.min(along * 1.6, 0.6); // it stops on the way
      const [x, y] = point(pulse.curve, along, 3);
      this.shape(pulse.kind, x, y);
    }
    pen.globalAlpha = 1;
    this.frame = this.pulses.length ? requestAnimationFrame(() => this.draw()) : 0;
  }

  shape(kind, x, y) {
    const pen = this.pen;
    pen.fillStyle = pen.strokeStyle = this.colors[kind] || this.colors.call;
    pen.beginPath();
    if (kind === "drop") {
      pen.lineWidth = 2.2;
      pen.moveTo(x - 5, y - 5);
      pen.lineTo(x + 5, y + 5);
      pen.moveTo(x - 5, y + 5);
      pen.lineTo(x + 5, y - 5);
      pen.stroke();
      return;
    }
    if (kind === "gossip") {
      pen.moveTo(x, y - 5);
      pen.lineTo(x + 5, y);
      pen.lineTo(x, y + 5);
      pen.lineTo(x - 5, y);
      pen.closePath();
    } else if (kind === "copy") pen.rect(x - 3.8, y - 3.8, 7.6, 7.6);
    else pen.arc(x, y, 4, 0, 2 * Math.PI);
    pen.fill();
    pen.lineWidth = 1;
    pen.strokeStyle = this.paper;
    pen.stroke();
  }

  clear() {
    this.pulses.length = 0;
    if (this.pen) this.pen.clearRect(0, 0, this.width, this.height);
  }

  close() {
    cancelAnimationFrame(this.frame);
    clearTimeout(this.movedTimer);
  }
}

// A point of a quadratic curve; `aside` pixels to its left, so that the two directions of a link pass each other.
function point([x1, y1, kx, ky, x2, y2], t, aside = 0) {
  const u = 1 - t;
  const x = u * u * x1 + 2 * u * t * kx + t * t * x2;
  const y = u * u * y1 + 2 * u * t * ky + t * t * y2;
  if (!aside) return [x, y];
  const dx = u * (kx - x1) + t * (x2 - kx);
  const dy = u * (ky - y1) + t * (y2 - ky);
  const length = Math.hypot(dx, dy) || 1;
  return [x + (aside * dy) / length, y - (aside * dx) / length];
}

// -- panels

class Gauges {
  constructor() {
    this.tiles = new Map();
    this.element = html("div", { class: "gs-tiles" });
  }

  apply(gauges) {
    for (const gauge of gauges) {
      let tile = this.tiles.get(gauge.id);
      if (!tile) {
        tile = { area: svg("path", { class: "gs-area" }), line: svg("path", { class: "gs-spark" }) };
        tile.value = html("b", {});
        tile.most = html("span", { class: "gs-most" });
        const picture = svg("svg", { viewBox: "0 0 180 36", preserveAspectRatio: "none", "aria-hidden": "true" }, tile.area, tile.line);
        const words = html("div", { class: "gs-tile-words" }, html("span", {}, gauge.label), tile.value);
        this.element.append(html("div", { class: "gs-tile", "data-gauge": gauge.id }, tile.most, picture, words));
        this.tiles.set(gauge.id, tile);
      }
      say(tile.value, gauge.text);
      const top = Math.max(...gauge.points, 1e-9);
      // The newest at the right end; a young cluster's line starts further right, it does not stretch.
      const spots = gauge.points.map((value, i) => [180 - (gauge.points.length - 1 - i) * (180 / 59), 34 - (30 * value) / top]);
      const line = spots.map(([x, y]) => `${px(x)} ${px(y)}`).join("L");
      put(tile.line, { d: line ? `M${line}` : "" });
      put(tile.area, { d: line ? `M${px(spots[0][0])} 36L${line}L180 36Z` : "" });
      say(tile.most, top >= 1 ? `max ${Math.round(top).toLocaleString("en")}` : "");
    }
  }
}

class Ticker {
  constructor(onPick) {
    this.rows = new Map();
    this.onPick = onPick;
    this.list = html("ol", { class: "gs-events-list", tabindex: 0, role: "log", "aria-live": "off", "aria-label": "Events, newest first" });
    this.element = this.list;
  }

  // Lines oldest first; a line that is there already is rewritten in its place.
  add(lines) {
    for (const line of lines) {
      let row = this.rows.get(line.id);
      if (!row) {
        row = { time: html("time", {}), tag: html("span", { class: "gs-tag" }), text: html("span", { class: "gs-text" }) };
        row.item = html("li", {}, row.time, row.tag, row.text);
        row.item.addEventListener("click", () => this.onPick(row.line));
        this.rows.set(line.id, row);
        // By time, newest on top; news of several nodes may arrive out of order.
        const older = [...this.list.children].find((item) => Number(item.dataset.ms) <= line.ms);
        row.item.dataset.ms = line.ms;
        this.list.insertBefore(row.item, older ?? null);
      }
      row.line = line;
      say(row.time, line.time);
      say(row.tag, line.tag);
      put(row.tag, { "data-tag": line.tag });
      say(row.text, line.text);
      put(row.item, { title: line.text });
    }
    for (const [id, row] of this.rows) {
      if (this.rows.size <= LINES_MAX) break;
      row.item.remove();
      this.rows.delete(id);
    }
  }

  of(id) {
    return [...this.rows.values()].map((row) => row.line).filter((line) => line.nodes.includes(id) || mentions(line.text, id)).sort((a, b) => b.id - a.id);
  }
}

function mentions(text, id) {
  return text.split(/[^A-Za-z0-9_.-]+/).includes(id);
}

// The consensus groups: a row each, kept and updated in place, so that a leader changes and nothing moves.
class Consensus {
  constructor(colorOf, onPick) {
    this.colorOf = colorOf;
    this.onPick = onPick;
    this.rows = new Map(); // group -> {item, lead, term, cells, ...}
    this.words = html("span", { class: "gs-groups-words" });
    this.trouble = html("b", { class: "gs-groups-trouble" });
    this.note = html("p", { class: "gs-groups-note" });
    this.list = html("ol", { class: "gs-groups-list", tabindex: 0, "aria-label": "Consensus groups" });
    const key = (look, member, name, lag = "") => html("span", { class: "gs-replica", "data-look": look, "data-member": member }, html("i", { style: `width: ${look === "snapshot" ? 37 : 100}%` }), html("span", { class: "gs-replica-name" }, name), html("span", { class: "gs-lag" }, lag));
    const legend = html("div", { class: "gs-groups-legend", "aria-hidden": "true" }, "term, commit index, logs:", key("leader", "voter", "leads"), key("follower", "voter", "lacks", "\u22123"), key("snapshot", "voter", "snapshot", "37 %"), key("probe", "learner", "+learns"), key("follower", "leaving", "leaves"));
    const head = html("div", { class: "gs-groups-head" }, html("h3", {}, "Consensus"), this.words, this.trouble, this.note, legend);
    this.element = html("section", { class: "gs-consensus" }, head, this.list);
  }

  apply(panel) {
    say(this.words, panel?.words ?? "");
    say(this.trouble, panel?.trouble ?? "");
    put(this.trouble, { title: panel?.trouble ?? "" });
    say(this.note, panel?.note ?? "");
    const rows = panel?.rows ?? [];
    const known = new Set(rows.map((row) => row.id));
    for (const [id, row] of this.rows) {
      if (!known.has(id)) {
        row.item.remove();
        this.rows.delete(id);
      }
    }
    rows.forEach((data, place) => {
      const row = this.rows.get(data.id) ?? this.addRow(data.id);
      if (this.list.children[place] !== row.item) this.list.insertBefore(row.item, this.list.children[place] ?? null);
      this.drawRow(row, data);
    });
    this.mark(this.selected);
  }

  addRow(id) {
    const row = { cells: new Map(), lead: html("button", { class: "gs-lead", type: "button", tabindex: -1 }), term: html("span", { class: "gs-term" }), commit: html("span", { class: "gs-commit" }) };
    row.replicas = html("span", { class: "gs-replicas" });
    row.item = html("li", { "data-group": id }, html("span", { class: "gs-group-name" }, id), row.lead, row.term, row.commit, row.replicas);
    row.lead.addEventListener("click", () => row.data.leader && this.onPick(row.data.leader));
    this.rows.set(id, row);
    return row;
  }

  drawRow(row, data) {
    const before = row.data;
    row.data = data;
    put(row.item, { "data-look": data.look, title: data.title });
    say(row.lead, data.word);
    put(row.lead, { "aria-label": data.title });
    row.lead.style.setProperty("--c", this.colorOf(data.leader));
    if (before?.term !== data.term) {
      // Another element, so that its flash begins anew; not at the first sight of it.
      const term = html("span", { class: before ? "gs-term gs-news" : "gs-term" }, `term ${data.term}`);
      row.term.replaceWith(term);
      row.term = term;
    }
    say(row.commit, data.commit);
    const known = new Set(data.cells.map((cell) => cell.id));
    for (const [id, cell] of row.cells) {
      if (!known.has(id)) {
        cell.element.remove();
        row.cells.delete(id);
      }
    }
    data.cells.forEach((one, place) => {
      const cell = row.cells.get(one.id) ?? this.addCell(row, one.id);
      if (row.replicas.children[place] !== cell.element) row.replicas.insertBefore(cell.element, row.replicas.children[place] ?? null);
      this.drawCell(cell, one);
    });
  }

  addCell(row, id) {
    const cell = { name: html("span", { class: "gs-replica-name" }), fill: html("i", {}), text: html("span", { class: "gs-lag" }) };
    cell.element = html("span", { class: "gs-replica", "data-replica": id }, cell.fill, cell.name, cell.text);
    row.cells.set(id, cell);
    return cell;
  }

  drawCell(cell, data) {
    put(cell.element, { "data-look": data.look, "data-member": data.member, title: data.title });
    cell.element.style.setProperty("--c", this.colorOf(data.id));
    say(cell.name, data.member === "learner" ? `+${data.id}` : data.id);
    cell.fill.style.width = `${(100 * data.fill).toFixed(1)}%`;
    say(cell.text, data.text);
    // A snapshot may come and be installed between two pictures.
    const installed = cell.installed !== undefined && data.installed > 0 && data.installed !== cell.installed;
    if (installed) {
      const fill = html("i", { class: "gs-installed" });
      fill.style.width = cell.fill.style.width;
      cell.fill.replaceWith(fill);
      cell.fill = fill;
      setTimeout(() => fill.classList.remove("gs-installed"), INSTALLED_MS);
    }
    cell.installed = data.installed;
  }

  // What the selected node leads stands out.
  mark(id) {
    this.selected = id;
    for (const row of this.rows.values()) row.item.classList.toggle("gs-mine", id != null && row.data.leader === id);
  }
}

class Detail {
  constructor(onClose) {
    this.title = html("h3", {});
    this.close = html("button", { class: "gs-button gs-close", "aria-label": "Close the node's panel", title: "Close (Esc)" }, "×");
    this.close.addEventListener("click", onClose);
    this.facts = html("dl", {});
    this.events = html("ol", { class: "gs-own-events" });
    this.body = html("div", { class: "gs-detail-body", tabindex: 0, "aria-label": "Details" }, this.facts, this.events);
    this.element = html("section", { class: "gs-detail" }, html("div", { class: "gs-row" }, this.title, this.close), this.body);
  }

  show(picture, id, ticker) {
    const node = picture.nodes.find((candidate) => candidate.id === id);
    this.close.hidden = !node;
    say(this.title, node ? node.label : picture.mode === "cluster" ? "Cluster" : "Nodes");
    this.element.style.setProperty("--c", node ? node.color : "transparent");
    let facts = node ? node.facts : picture.summary;
    if (!node) facts = [...facts, ["nodes", picture.nodes.length ? "click one, or walk them with Tab and the arrows" : "none yet"]];
    const text = JSON.stringify(facts);
    if (text !== this.text) {
      this.text = text;
      this.facts.replaceChildren(...facts.flatMap(([key, value]) => [html("dt", {}, key), html("dd", { title: value }, value)]));
    }
    const lines = node ? ticker.of(id).slice(0, 4) : [];
    const own = lines.map((line) => `${line.time} ${line.text}`);
    if (own.join("\n") !== this.own) {
      this.own = own.join("\n");
      this.events.replaceChildren(...own.map((words) => html("li", { title: words }, words)));
    }
  }
}

// -- the whole

class View {
  constructor(model, el) {
    this.model = model;
    this.selected = null;
    this.paused = false;
    this.heard = performance.now();
    this.picture = model.get("picture");
    this.root = html("div", { class: "gs-view", "data-lm-suppress-shortcuts": "true", "data-mode": this.picture.mode || "graph" });
    this.stage = new Stage(this.root, (id) => this.select(id));
    this.gauges = new Gauges();
    this.ticker = new Ticker((line) => this.select(line.nodes.find((id) => this.stage.nodes.has(id)) ?? null));
    this.detail = new Detail(() => this.select(null));
    this.consensus = new Consensus((id) => this.stage.nodes.get(id)?.data.color ?? "var(--gs-gone)", (id) => this.select(id));
    this.buildHead();
    this.buildAsk();
    this.spoken = html("div", { class: "gs-hidden", role: "status", "aria-live": "polite" });
    const side = html(
      "div",
      { class: "gs-side" },
      this.detail.element,
      html("section", { class: "gs-gauges" }, html("h3", {}, "Last minute"), this.gauges.element),
      html("section", { class: "gs-events" }, html("h3", {}, "Events"), this.ticker.element),
    );
    const main = html("div", { class: "gs-main" }, this.stage.element, legend(), this.ask);
    this.root.append(html("div", { class: "gs-frame" }, this.head, main, side, this.consensus.element, this.spoken));
    // Letters typed here are no commands to the notebook.
    this.root.addEventListener("keydown", (event) => event.stopPropagation());
    el.append(this.root);
  }

  buildHead() {
    this.title = html("h2", {});
    this.facts = html("span", { class: "gs-facts" });
    this.chips = html("div", { class: "gs-chips" });
    this.status = html("span", { class: "gs-status" });
    this.pause = html("button", { class: "gs-button", "aria-pressed": "false", "aria-label": "Pause the picture" }, "Pause");
    this.pause.addEventListener("click", () => this.setPaused(!this.paused));
    const name = html("div", { class: "gs-title" }, this.title, this.facts);
    this.head = html("header", { class: "gs-head" }, name, this.chips, this.status, this.pause);
  }

  buildAsk() {
    this.input = html("input", { type: "text", maxlength: 1024, placeholder: "key or /path", "aria-label": "A key, or a file's path", spellcheck: "false" });
    this.answer = html("output", { class: "gs-answer" });
    const button = html("button", { class: "gs-button", type: "submit" }, "Show");
    this.ask = html("form", { class: "gs-ask" }, html("span", {}, "Where is"), this.input, button, this.answer);
    this.ask.addEventListener("submit", (event) => {
      event.preventDefault();
      say(this.answer, this.input.value ? "asking…" : "");
      // The kernel answers between cells, unlike the stream of events, which has a thread of its own there.
      clearTimeout(this.askTimer);
      this.askTimer = setTimeout(() => {
        if (this.answer.textContent === "asking…") say(this.answer, "asking… a running cell goes first");
      }, ASK_MS);
      this.model.send({ type: "locate", text: this.input.value });
    });
  }

  start() {
    const onPicture = () => this.onPicture();
    const onRing = () => this.onRing();
    const onMessage = (message) => this.onMessage(message);
    this.model.on("change:picture", onPicture);
    this.model.on("change:ring", onRing);
    this.model.on("msg:custom", onMessage);
    this.observer = new ResizeObserver(() => this.stage.layout());
    this.observer.observe(this.stage.element);
    this.theme = new MutationObserver(() => this.stage.readColors());
    this.theme.observe(document.body, { attributes: true });
    this.timer = setInterval(() => this.beat(), 250);
    this.onRing();
    this.onPicture();
    return () => {
      this.model.off("change:picture", onPicture);
      this.model.off("change:ring", onRing);
      this.model.off("msg:custom", onMessage);
      this.observer.disconnect();
      this.theme.disconnect();
      clearInterval(this.timer);
      clearTimeout(this.askTimer);
      this.stage.close();
    };
  }

  beat() {
    if (!this.paused) this.stage.fade();
    this.showStatus();
  }

  onMessage(message) {
    this.heard = performance.now();
    if (message.type !== "tick" || this.paused) return;
    if (message.pulses) this.stage.tick(message.pulses);
    if (message.lines?.length) {
      this.ticker.add(message.lines);
      if (this.selected !== null) this.showDetail();
    }
  }

  onRing() {
    this.heard = performance.now();
    if (!this.paused) this.stage.setRing(this.model.get("ring"));
  }

  onPicture() {
    this.heard = performance.now();
    if (this.paused) return;
    const before = this.picture;
    const picture = (this.picture = this.model.get("picture"));
    if (!picture.nodes) return;
    this.speak(before, picture);
    this.root.dataset.mode = picture.mode;
    say(this.title, picture.title);
    put(this.title, { title: picture.name });
    say(this.facts, [...picture.facts, picture.uptime ? `up ${picture.uptime}` : ""].filter(Boolean).join(" · "));
    this.showChips(picture.chips);
    this.stage.apply(picture);
    this.gauges.apply(picture.gauges);
    this.consensus.apply(picture.consensus);
    this.ticker.add([...picture.ticker].reverse());
    if (picture.mark) say(this.answer, picture.mark.words);
    else if (before.mark) say(this.answer, "");
    put(this.answer, { title: picture.mark?.words || "" });
    if (this.selected !== null && !this.stage.nodes.has(this.selected)) this.select(null);
    this.showDetail();
    this.showStatus();
  }

  showChips(chips) {
    const text = JSON.stringify(chips);
    if (text === this.chipText) return;
    this.chipText = text;
    this.chips.replaceChildren(...chips.map(([look, words]) => html("span", { class: "gs-chip", "data-look": look }, words)));
  }

  showStatus() {
    if (this.picture.mode !== "cluster") return;
    const silent = performance.now() - this.heard;
    let [status, words] = [this.picture.status, this.picture.status];
    if (this.paused) [status, words] = ["paused", "paused"];
    else if (status === "live" && silent > NEWS_MS) [status, words] = ["lost", `no news for ${Math.floor(silent / 1000)} s`];
    else if (this.picture.note) [status, words] = ["lost", this.picture.note];
    put(this.status, { "data-status": status, title: words });
    put(this.root, { "data-status": status });
    say(this.status, words);
    this.pause.disabled = status === "stopped";
  }

  speak(before, now) {
    if (!before?.nodes) return;
    const old = new Map(before.nodes.map((node) => [node.id, node.state]));
    const news = now.nodes.filter((node) => old.has(node.id) && old.get(node.id) !== node.state);
    if (news.length) say(this.spoken, news.map((node) => `${node.label} is ${node.state}`).join(", "));
    if (before.status !== now.status) say(this.spoken, `The cluster is ${now.status}`);
  }

  showDetail() {
    this.detail.show(this.picture, this.selected, this.ticker);
  }

  select(id) {
    this.selected = this.stage.selected = id;
    this.consensus.mark(id);
    this.stage.drawHeld();
    for (const node of this.stage.nodes.values()) this.stage.drawNode(node);
    this.showDetail();
  }

  setPaused(paused) {
    this.paused = paused;
    put(this.pause, { "aria-pressed": paused });
    say(this.pause, paused ? "Resume" : "Pause");
    this.stage.clear();
    if (!paused) {
      this.onRing();
      this.onPicture();
    }
    this.showStatus();
  }
}

function legend() {
  const item = (name, shape) => html("span", {}, svg("svg", { width: 16, height: 16, viewBox: "-8 -8 16 16", "aria-hidden": "true", class: `gs-key gs-key-${name}` }, shape), name);
  return html(
    "div",
    { class: "gs-legend", "aria-label": "Legend" },
    item("call", svg("circle", { r: 4.5 })),
    item("copy", svg("rect", { x: -4, y: -4, width: 8, height: 8 })),
    item("gossip", svg("path", { d: "M0-5.5L5.5 0L0 5.5L-5.5 0Z" })),
    item("dropped", svg("path", { d: "M-5-5L5 5M-5 5L5-5" })),
    item("suspect", svg("circle", { r: 6 })),
    item("gone", svg("circle", { r: 6 })),
    item("master", svg("g", {}, svg("circle", { r: 4 }), svg("circle", { r: 7, class: "gs-crown" }))),
  );
}

function render({ model, el }) {
  return new View(model, el).start();
}

export default { render };
