// Arithmetic of soup weights. A mix maps the name of every ingredient to its weight.

export const even = (names) => Object.fromEntries(names.map((name) => [name, 1 / names.length]));
export const zero = (names) => Object.fromEntries(names.map((name) => [name, 0]));

export function random(names) {
  // Uniform over all shares: exponential draws, normalized.
  const draws = names.map(() => -Math.log(1 - Math.random()));
  const sum = draws.reduce((total, draw) => total + draw, 0);
  return Object.fromEntries(names.map((name, i) => [name, draws[i] / sum]));
}

// A mix over exactly these names.
export const complete = (names, mix) =>
  Object.fromEntries(names.map((name) => [name, Number.isFinite(mix?.[name]) ? mix[name] : 0]));

export const shown = (weight) => {
  const text = weight.toFixed(2);
  return text === "-0.00" ? "0.00" : text.replace("-", "−");
};

export const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
export const lasted = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

// What a request sends: no zeros.
export const sent = (mix) =>
  Object.fromEntries(
    Object.entries(mix)
      .map(([name, weight]) => [name, Number(weight.toFixed(6))])
      .filter(([, weight]) => weight !== 0),
  );

// Shares of three weights: not negative, with sum 1. Equal where nothing is positive.
export function shares(weights) {
  const positive = weights.map((weight) => Math.max(weight, 0));
  const sum = positive[0] + positive[1] + positive[2];
  return sum > 0 ? positive.map((weight) => weight / sum) : [1 / 3, 1 / 3, 1 / 3];
}

// What three weights share: their sum, or 1 where nothing is positive.
export function total(weights) {
  const sum = weights.reduce((found, weight) => found + Math.max(weight, 0), 0);
  return sum > 0 ? sum : 1;
}
