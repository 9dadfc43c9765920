"use strict";
// Answer for another target, memory or headroom from the plan's table of peaks.
// The rules and names are those of what_if.py, which describes them; tests compare the two.

const whatIf = (() => {
  const UNITS = { "": 1n, K: 2n ** 10n, M: 2n ** 20n, G: 2n ** 30n, T: 2n ** 40n };
  const DECIMAL = { K: 10n ** 3n, M: 10n ** 6n, G: 10n ** 9n, T: 10n ** 12n };
  const SIZE = /^\s*(\d{1,30})(?:\.(\d{1,30}))?\s*([KMGT]?)(iB|B)?\s*$/i;
  const PERCENT = /^\s*(\d{1,30})(?:\.(\d{1,30}))?\s*%\s*$/;

  // Whole numbers throughout, as in Python: 1.001KB is 1001 bytes, not 1000.9999.
  const parseSize = (text) => {
    const match = SIZE.exec(text);
    if (!match) return null;
    const [, whole, part = "", unit, suffix = ""] = match;
    const key = unit.toUpperCase();
    const times = suffix.toLowerCase() === "b" && key ? DECIMAL[key] : UNITS[key];
    return (BigInt(whole + part) * times) / 10n ** BigInt(part.length);
  };

  const parsePart = (text, whole) => {
    const match = PERCENT.exec(text);
    if (!match) return parseSize(text);
    const part = match[2] || "";
    const number = BigInt(match[1] + part);
    const hundred = 100n * 10n ** BigInt(part.length);
    return number >= hundred ? null : (whole * number) / hundred;
  };

  const invalid = (why) => ({
    status: "invalid", split: [], peak_bytes: 0, budget_bytes: 0, missing_bytes: 0, at_most: false, beyond: false, why,
  });

  const balanced = (samples, steps) => {
    const size = Math.floor(samples / steps);
    const larger = samples % steps;
    return { first: larger ? size + 1 : size, second: larger > 1 ? size + 1 : size, last: size, steps, larger };
  };

  // One size repeated and the rest, the most even first: solver.py's `uneven`.
  const uneven = (table, samples, steps, most) => {
    const even = Math.ceil(samples / steps);
    const largest = Math.min(most, Math.floor((samples - table.least) / (steps - 1)), even + Math.ceil(even / 4));
    const found = [];
    for (let size = even; size <= largest; size += 1 + Math.floor(even / (4 * table.most_uneven))) {
      const rest = samples - size * (steps - 1);
      if (size - rest > 1) {
        found.push({ first: size, second: steps > 2 ? size : rest, last: rest, steps, repeated: true });
      }
    }
    return found;
  };

  // The number of steps after `steps` whose windows differ in size: split_shapes.py's `differing_steps`.
  const nextSteps = (samples, steps) => {
    const size = Math.floor(samples / steps);
    const even = Math.floor(samples / size);
    return [Math.floor((samples - 1) / size), even, even + 1].find((each) => each > steps);
  };

  const runs = (split) =>
    split.repeated ? [[split.steps - 1, split.first], [1, split.last]] :
    split.larger ? [[split.larger, split.last + 1], [split.steps - split.larger, split.last]] : [[split.steps, split.last]];

  const row = (table, size) => {
    let [low, high] = [0, table.rows.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (table.rows[middle][0] < size) low = middle + 1;
      else high = middle;
    }
    return table.rows[low];
  };

  const dataBytes = (table, samples) => {
    const asked = samples * table.sample_bytes + table.mapping_overhead_bytes;
    return table.sample_bytes ? Math.ceil(asked / table.page_bytes) * table.page_bytes : 0;
  };

  const peakBytes = (table, samples, split) => {
    const [first, second, last] = [split.first, split.second, split.last].map((size) => row(table, size));
    if (!first || !second || !last) return null;
    const later = split.steps > 1 ? Math.max(second[2], last[2]) : 0;
    const window = Math.max(first[1], later, last[3], last[4]);
    const training = dataBytes(table, samples) + table.history_bytes + window;
    return table.baseline_bytes + training + Math.trunc(table.malloc_overhead * training);
  };

  const answer = (table, target, budget) => {
    const chosen = table.chosen;
    if (chosen && target === chosen.target_batch && budget === chosen.budget_bytes) {
      return {
        status: "fits", split: chosen.split, peak_bytes: chosen.peak_bytes, budget_bytes: budget, missing_bytes: 0,
        at_most: false, beyond: false, why: "",
      };
    }
    if (target < table.world_size) {
      return invalid(`The target batch must be at least ${table.world_size}: each rank needs a sample.`);
    }
    const samples = Math.ceil(target / table.world_size);
    const most = Math.min(table.most || samples, samples);
    const least = table.least;
    if (samples < least || Math.floor(samples / least) < Math.ceil(samples / most)) {
      return invalid(`Micro-batches of ${least} to ${most} cannot total ${samples} samples.`);
    }
    const usable = Math.trunc(budget * (1 - table.margin));
    const largest = table.rows[table.rows.length - 1][0];
    const isExact = (split) => [split.first, split.last].every((size) => (row(table, size) || [])[0] === size);
    const from = Math.max(1, Math.ceil(samples / Math.min(most, largest)));
    const fits = (split, count) => {
      const peak = peakBytes(table, count, split);
      return peak !== null && peak <= usable;
    };
    const known = new Map(); // whether a window of two micro-batches of a size fits
    const repeats = (size) => {
      if (!known.has(size)) known.set(size, fits({ first: size, second: size, last: size, steps: 2 }, 2 * size));
      return known.get(size);
    };
    for (let steps = from; steps <= Math.floor(samples / least); steps = nextSteps(samples, steps)) {
      const even = balanced(samples, steps);
      const reach = Math.min(most, largest);
      const others = steps > 1 ? uneven(table, samples, steps, reach).filter((each) => repeats(each.first)) : [];
      const split = [even, ...others].find((each) => fits(each, samples));
      if (!split) continue;
      const fewerAreBeyond = most > largest && steps > 1 && Math.ceil(samples / (steps - 1)) > largest;
      const end = { first: largest, second: largest, last: largest, steps: Math.min(2, steps) };
      return {
        status: "fits", split: runs(split), peak_bytes: peakBytes(table, samples, split), budget_bytes: budget,
        missing_bytes: 0, at_most: !isExact(split), beyond: fewerAreBeyond && fits(end, largest * end.steps), why: "",
      };
    }
    const split = balanced(samples, Math.floor(samples / least));
    const needed = Math.trunc((peakBytes(table, samples, split) || 0) / (1 - table.margin));
    return {
      status: "does not fit", split: runs(split), peak_bytes: needed, budget_bytes: budget,
      missing_bytes: Math.max(1, needed - budget), at_most: !isExact(split), beyond: false, why: "",
    };
  };

  const ask = (table, target, memory, headroom) => {
    if (!/^\d{1,7}$/.test(target.trim())) {
      return invalid("The target batch must be a whole number of samples below 10 million.");
    }
    const limit = parseSize(memory);
    if (limit === null || limit <= 0n) return invalid("The memory must be a size such as 2GiB, 1.5GiB, 800MiB or 12GB.");
    const kept = parsePart(headroom.trim() || "0", limit);
    if (kept === null) return invalid("The headroom must be a percentage or a size such as 5% or 500MiB.");
    if (kept >= limit) return invalid("The headroom must be smaller than the memory.");
    return answer(table, Number(target), Number(limit - kept));
  };

  const showBytes = (size) => {
    if (Math.abs(size) < 1024) return `${size} B`;
    for (const [unit, bytes] of [["KiB", 2 ** 10], ["MiB", 2 ** 20]]) {
      const text = (size / bytes).toFixed(1);
      if (Math.abs(Number(text)) < 1024) return `${text} ${unit}`;
    }
    return `${(size / 2 ** 30).toFixed(2)} GiB`;
  };

  const describe = (found) => {
    if (found.status === "invalid") return found.why;
    const steps = found.split.reduce((sum, [count]) => sum + count, 0);
    const number = (value) => value.toLocaleString("en");
    const sizes = found.split.map(([count, size]) => `${number(count)} × ${number(size)}`).join(" and ");
    const peak = `${found.at_most ? "at most " : ""}${showBytes(found.peak_bytes)}`;
    if (found.status !== "fits") {
      const missing = `${showBytes(found.missing_bytes)} (${found.missing_bytes.toLocaleString("en")} bytes)`;
      return `Does not fit: even micro-batches of ${number(found.split[0][1])} need ${peak}; ${missing} are missing.`;
    }
    const left = showBytes(found.budget_bytes - found.peak_bytes);
    const more = found.beyond ? " The table ends at this size: fewer steps may fit, plan again to verify." : "";
    return `${number(steps)} accumulation step${steps > 1 ? "s" : ""}: ${sizes}. Peak ${peak}, ${left} free.${more}`;
  };

  return { ask, answer, describe, showBytes };
})();

if (typeof document !== "undefined") {
  const form = document.getElementById("what-if-form");
  const table = JSON.parse(document.getElementById("what-if-table").textContent);
  const output = document.getElementById("what-if-answer");
  const chart = document.getElementById("peaks-plot");
  const fields = ["target", "memory", "headroom"].map((name) => form.elements.namedItem(name));

  const place = (id, shown, x, y) => {
    const mark = document.getElementById(id);
    if (!mark || !chart) return;
    const [xMost, yMost] = [Number(chart.dataset.x), Number(chart.dataset.y)];
    mark.hidden = !shown || x > xMost || y > yMost;
    if (x !== null) mark.style.left = `${(100 * x) / xMost}%`;
    mark.style.bottom = `${(100 * y) / yMost}%`;
  };

  const update = () => {
    const found = whatIf.ask(table, ...fields.map((field) => field.value));
    const changed = fields.some((field) => field.value !== field.defaultValue);
    output.textContent = whatIf.describe(found);
    output.dataset.status = found.status;
    output.dataset.answer = JSON.stringify(found);
    fields.forEach((field) => field.removeAttribute("aria-invalid"));
    if (found.status === "invalid") {
      const wrong = found.why.startsWith("The memory") ? 1 : found.why.startsWith("The headroom") ? 2 : 0;
      fields[wrong].setAttribute("aria-invalid", "true");
    }
    place("what-if-budget", changed && found.status !== "invalid", null, found.budget_bytes);
    place("what-if-point", changed && found.status === "fits", found.split.length ? found.split[0][1] : 0, found.peak_bytes);
  };

  const asked = new URLSearchParams(location.hash.slice(1)); // report.html#target=256&memory=2GiB&headroom=5%25
  fields.forEach((field) => {
    if (asked.has(field.name)) field.value = asked.get(field.name);
  });
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(update, 0));
  document.getElementById("what-if").hidden = false;
  update();
}
if (typeof module !== "undefined") module.exports = whatIf;
