// A triangle over three ingredients: a point inside it shares out what the three weigh together.

import { shares, total } from "./weights.js";

const CORNERS = [
  [50, 5],
  [4, 84.7],
  [96, 84.7],
]; // top, left, right, in units of the drawing
const STEP = 0.05;
const LEAP = 0.25;
const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes) {
  const found = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
  return found;
}

// Shares of the corners at a point; outside of the triangle those of a point on its edge.
function barycentric(x, y) {
  const [[ax, ay], [bx, by], [cx, cy]] = CORNERS;
  const area = (by - cy) * (ax - cx) + (cx - bx) * (ay - cy);
  const a = ((by - cy) * (x - cx) + (cx - bx) * (y - cy)) / area;
  const b = ((cy - ay) * (x - cx) + (ax - cx) * (y - cy)) / area;
  return shares([a, b, 1 - a - b]);
}

const MOVES = {
  ArrowUp: [1, -0.5, -0.5],
  ArrowDown: [-1, 0.5, 0.5],
  ArrowLeft: [0, 1, -1],
  ArrowRight: [0, -1, 1],
  PageUp: [1, -0.5, -0.5],
  PageDown: [-1, 0.5, 0.5],
};

export class Triangle {
  // onchange gets the three new weights.
  constructor(root, helpId, onchange) {
    this.onchange = onchange;
    this.weights = [0, 0, 0];
    this.labels = ["", "", ""];
    this.svg = element("svg", { viewBox: "0 0 100 90", class: "plane" });
    this.svg.append(element("polygon", { points: CORNERS.map((corner) => corner.join(",")).join(" "), class: "field" }));
    for (let corner = 0; corner < 3; corner++) {
      const [from, to] = [0, 1, 2].filter((other) => other !== corner).map((other) => CORNERS[other]);
      const middle = [(from[0] + to[0]) / 2, (from[1] + to[1]) / 2];
      this.svg.append(
        element("line", {
          x1: CORNERS[corner][0],
          y1: CORNERS[corner][1],
          x2: middle[0],
          y2: middle[1],
          class: "grid",
        }),
      );
    }
    this.handle = element("circle", {
      r: 4,
      class: "handle",
      tabindex: "0",
      role: "slider",
      "aria-valuemin": "0",
      "aria-valuemax": "100",
      "aria-describedby": helpId,
    });
    this.svg.append(this.handle);
    root.append(this.svg);
    this.svg.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      this.svg.setPointerCapture(event.pointerId);
      this.handle.focus({ focusVisible: false });
      this.drag(event);
    });
    this.svg.addEventListener("pointermove", (event) => {
      if (this.svg.hasPointerCapture(event.pointerId)) this.drag(event);
    });
    this.handle.addEventListener("keydown", (event) => this.press(event));
  }

  drag(event) {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(this.svg.getScreenCTM().inverse());
    this.move(barycentric(point.x, point.y));
  }

  press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Home") {
      this.move([1 / 3, 1 / 3, 1 / 3]);
    } else if (MOVES[event.key]) {
      const step = event.key.startsWith("Page") || event.shiftKey ? LEAP : STEP;
      const now = shares(this.weights);
      this.move(shares(now.map((share, i) => share + step * MOVES[event.key][i])));
    } else {
      return;
    }
    event.preventDefault();
  }

  move(parts) {
    const sum = total(this.weights);
    // Rounded, so that keys come back to where they started.
    this.onchange(parts.map((part) => Number((part * sum).toFixed(6))));
  }

  show(weights, labels) {
    this.weights = weights;
    this.labels = labels;
    const parts = shares(weights);
    const place = [0, 1].map((axis) => parts.reduce((sum, part, i) => sum + part * CORNERS[i][axis], 0));
    this.handle.setAttribute("cx", place[0]);
    this.handle.setAttribute("cy", place[1]);
    const percent = parts.map((part) => Math.round(100 * part));
    this.handle.setAttribute("aria-label", `Shares of ${labels.join(", ")}`);
    this.handle.setAttribute("aria-valuenow", percent[0]);
    this.handle.setAttribute("aria-valuetext", labels.map((label, i) => `${label} ${percent[i]} %`).join(", "));
  }
}
