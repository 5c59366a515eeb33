// The measuring view. `props.value` is JSON of page.py's `payload`, or "". Depth: exp(a + b * v) metres of each uint16 v.

const HINTS = {
  point: "Point at a pixel, tap it, or move with the arrow keys.",
  distance: "Two points: the straight distance between them in space.",
  line: "Points along a line, by clicks or by drawing: the sum of the straight pieces in space.",
  area: "Three or more corners: the area of their polygon on the plane that fits the depth within it.",
};
const view = { map: null, points: [], at: null, tool: "point", slider: false, split: 0.5, drawing: null };
const find = (selector) => element.querySelector(selector);

async function inflate(base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint16Array(await new Response(stream).arrayBuffer());
}

async function load() {
  const value = props.value;
  if (!value) {
    view.map = null;
    show();
    return;
  }
  document.body.toggleAttribute("data-drawing", true); // words wait for the map: see page.py's STYLE
  const data = JSON.parse(value);
  const same = view.map && view.map.key === data.key; // only the focal length is another one
  const [values, photo] = await Promise.all([inflate(data.depth), picture(data.photo)]);
  if (props.value !== value) return; // a newer one came meanwhile
  const depth = Float32Array.from(values, (v) => Math.exp(data.a + data.b * v));
  view.map = { ...data, values: depth, photo, colors: paint(data, depth) };
  if (!same) Object.assign(view, { points: [], at: null });
  show();
  document.body.removeAttribute("data-drawing");
}

function picture(source) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = reject;
    image.src = source;
  });
}

function shade(data, metres) {
  const place = (Math.log(metres / data.near) / Math.log(data.far / data.near)) * data.palette.length;
  return data.palette[Math.min(Math.max(Math.floor(place), 0), data.palette.length - 1)];
}

function paint(data, depth) {
  const canvas = new OffscreenCanvas(data.width, data.height);
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(data.width, data.height);
  depth.forEach((metres, index) => {
    pixels.data.set(shade(data, metres), 4 * index);
    pixels.data[4 * index + 3] = 255;
  });
  context.putImageData(pixels, 0, 0);
  return canvas;
}

// Geometry, in the camera's frame: x right, y down, z forward, metres

const metresAt = ([x, y]) => view.map.values[y * view.map.width + x];
const ray = ([x, y]) => [(x - view.map.cx) / view.map.fx, (y - view.map.cy) / view.map.fy, 1];
const scaled = (vector, by) => vector.map((part) => part * by);
const pointAt = (pixel) => scaled(ray(pixel), metresAt(pixel));
const minus = (a, b) => a.map((part, index) => part - b[index]);
const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
const dot = (a, b) => a.reduce((sum, part, index) => sum + part * b[index], 0);

function lengthOf(pixels) {
  const points = pixels.map(pointAt);
  return points.slice(1).reduce((sum, point, index) => sum + Math.hypot(...minus(point, points[index])), 0);
}

// The plane is n . X = 1, so 1 / z = n . ray: linear in n, solved over the polygon's pixels.
function planeOf(polygon) {
  const { width, height } = view.map;
  const outline = new Path2D();
  polygon.forEach(([x, y], index) => (index ? outline.lineTo(x, y) : outline.moveTo(x, y)));
  const context = new OffscreenCanvas(1, 1).getContext("2d");
  const low = [0, 1].map((axis) => Math.max(0, Math.min(...polygon.map((pixel) => pixel[axis]))));
  const high = [0, 1].map((axis) => Math.min([width, height][axis] - 1, Math.max(...polygon.map((pixel) => pixel[axis]))));
  const normal = [0, 0, 0, 0, 0, 0];
  const right = [0, 0, 0];
  let count = 0;
  const step = Math.ceil(Math.sqrt(((high[0] - low[0]) * (high[1] - low[1])) / 40000)) || 1;
  for (let y = low[1]; y <= high[1]; y += step) {
    for (let x = low[0]; x <= high[0]; x += step) {
      if (!context.isPointInPath(outline, x, y)) continue;
      const r = ray([x, y]);
      const inverse = 1 / metresAt([x, y]);
      [[0, 0], [0, 1], [0, 2], [1, 1], [1, 2], [2, 2]].forEach(([i, j], place) => (normal[place] += r[i] * r[j]));
      r.forEach((part, axis) => (right[axis] += part * inverse));
      count++;
    }
  }
  const [aa, ab, ac, bb, bc, cc] = normal;
  const columns = [[aa, ab, ac], [ab, bb, bc], [ac, bc, cc]];
  const determinant = dot(columns[0], cross(columns[1], columns[2]));
  if (count < 3 || Math.abs(determinant) < 1e-30) return null;
  return [0, 1, 2].map((axis) => {
    const replaced = columns.map((column, index) => (index === axis ? right : column));
    return dot(replaced[0], cross(replaced[1], replaced[2])) / determinant;
  });
}

function areaOf(polygon) {
  const plane = planeOf(polygon);
  if (!plane) return null;
  const corners = polygon.map((pixel) => scaled(ray(pixel), 1 / dot(plane, ray(pixel))));
  const sum = corners
    .map((corner, index) => cross(minus(corner, corners[0]), minus(corners[(index + 1) % corners.length], corners[0])))
    .reduce((total, part) => total.map((value, axis) => value + part[axis]), [0, 0, 0]);
  return Math.hypot(...sum) / 2;
}

// Drawing

function show() {
  const { map } = view;
  find(".empty").hidden = Boolean(map);
  find(".panel").hidden = !map;
  element.querySelectorAll("button[data-tool]").forEach((button) => {
    button.setAttribute("aria-pressed", button.dataset.tool === view.tool);
  });
  find(".viewer").dataset.tool = view.tool;
  find("button[data-view]").setAttribute("aria-pressed", view.slider);
  find("figure.second").hidden = view.slider;
  find(".wipe").hidden = !view.slider;
  find(".hint").textContent = HINTS[view.tool];
  if (!map) return;
  for (const name of ["photo", "depth"]) {
    const canvas = find(`canvas.${name}`);
    if (canvas.width !== map.width || canvas.height !== map.height) Object.assign(canvas, { width: map.width, height: map.height });
    const context = canvas.getContext("2d");
    context.drawImage(name === "depth" ? map.colors : map.photo, 0, 0, map.width, map.height);
    if (name === "photo" && view.slider) {
      const from = Math.round(view.split * map.width);
      context.drawImage(map.colors, from, 0, map.width - from, map.height, from, 0, map.width - from, map.height);
      context.fillStyle = "white";
      context.fillRect(from - 1, 0, 2, map.height);
    }
    mark(context);
  }
  drawScale();
  read();
}

function mark(context) {
  const unit = Math.max(view.map.width / 320, 1);
  const stroke = (color, width, path) => Object.assign(context, { strokeStyle: color, lineWidth: width * unit }).stroke(path);
  const path = new Path2D();
  view.points.forEach(([x, y], index) => (index ? path.lineTo(x, y) : path.moveTo(x, y)));
  if (view.tool === "area" && view.points.length > 2) path.closePath();
  for (const [x, y] of view.points) {
    path.moveTo(x + 3 * unit, y);
    path.arc(x, y, 3 * unit, 0, 2 * Math.PI);
  }
  if (view.at) {
    const [x, y] = view.at;
    path.moveTo(x - 6 * unit, y);
    path.lineTo(x + 6 * unit, y);
    path.moveTo(x, y - 6 * unit);
    path.lineTo(x, y + 6 * unit);
  }
  stroke("black", 3, path);
  stroke("white", 1.2, path);
}

function drawScale() {
  const { map } = view;
  const canvas = find(".scale");
  canvas.width = Math.min(640, find(".panel").clientWidth);
  const context = canvas.getContext("2d");
  const margin = 24;
  const length = canvas.width - 2 * margin;
  context.clearRect(0, 0, canvas.width, canvas.height);
  for (let x = 0; x < length; x++) {
    context.fillStyle = `rgb(${shade(map, map.near * (map.far / map.near) ** (x / length)).join()})`;
    context.fillRect(margin + x, 0, 1, 16);
  }
  Object.assign(context, { fillStyle: getComputedStyle(element).color, font: "15px sans-serif", textAlign: "center" });
  let free = 0;
  for (const tick of map.ticks) {
    const x = margin + (length * Math.log(tick / map.near)) / Math.log(map.far / map.near);
    const half = context.measureText(`${tick} m`).width / 2;
    if (x - half < free || x + half > canvas.width) continue;
    context.fillRect(x, 16, 1, 5);
    context.fillText(`${tick} m`, x, 38);
    free = x + half + 8;
  }
  canvas.setAttribute("aria-label", `Scale from ${metres(map.near)} to ${metres(map.far)}`);
}

const metres = (value) => `${value.toPrecision(value < 1 ? 2 : 3)} m`;

function read() {
  const output = find(".reading");
  const { points, tool, at } = view;
  const parts = [];
  output.removeAttribute("data-value");
  if (at) {
    parts.push(`${metres(metresAt(at))} at (${at[0]}, ${at[1]})`);
    if (tool === "point") output.dataset.value = metresAt(at);
  }
  if (tool !== "point" && points.length > 1) {
    const value = tool === "area" ? (points.length > 2 ? areaOf(points) : null) : lengthOf(points);
    if (value !== null) {
      parts.unshift(tool === "area" ? `Area ${value.toPrecision(3)} m²` : `${tool === "line" ? "Length" : "Distance"} ${metres(value)}`);
      output.dataset.value = value;
    }
  }
  const text = parts.join(" · ");
  if (output.textContent !== text) output.textContent = text;
}

// Input

function pixelOf(event) {
  const box = event.target.getBoundingClientRect();
  const place = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  return place.map((part, axis) => clamp(Math.floor(part * [view.map.width, view.map.height][axis]), axis));
}

const clamp = (value, axis) => Math.min(Math.max(value, 0), [view.map.width, view.map.height][axis] - 1);
const onMap = (event) => view.map && event.target.closest(".frames canvas");

function add(pixel) {
  if (view.tool === "point") view.points = [pixel];
  else if (view.tool === "distance") view.points = view.points.length === 1 ? [...view.points, pixel] : [pixel];
  else view.points = [...view.points, pixel];
}

element.addEventListener("pointermove", (event) => {
  if (!onMap(event)) return;
  view.at = pixelOf(event);
  const last = view.points.at(-1);
  const far = last && Math.hypot(...minus(view.at, last)) > view.map.width / 60;
  if (view.drawing && view.tool === "line" && far && event.pointerId === view.drawing) {
    view.points = [...view.points, view.at];
  }
  show();
});
element.addEventListener("pointerdown", (event) => {
  if (!onMap(event)) return;
  view.at = pixelOf(event);
  view.drawing = event.pointerId;
  add(view.at);
  show();
});
window.addEventListener("pointerup", () => (view.drawing = null));
element.addEventListener("keydown", (event) => {
  if (!onMap(event)) return;
  const step = event.shiftKey ? 10 : 1;
  const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
  const from = view.at || [view.map.width >> 1, view.map.height >> 1];
  if (moves[event.key]) view.at = from.map((value, axis) => clamp(value + moves[event.key][axis], axis));
  else if (event.key === "Enter" || event.key === " ") add((view.at = from));
  else if (event.key === "Escape") view.points = [];
  else return;
  event.preventDefault();
  show();
});
element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.tool) Object.assign(view, { tool: button.dataset.tool, points: [] });
  if (button.dataset.view) view.slider = !view.slider;
  if ("clear" in button.dataset) view.points = [];
  show();
});
element.addEventListener("input", (event) => {
  if (event.target.type !== "range") return;
  view.split = event.target.value / 100;
  show();
});

watch("value", load);
load();
