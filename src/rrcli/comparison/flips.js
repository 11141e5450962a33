"use strict";
// The browser of problems that flipped. Texts are written with textContent alone, so that none becomes markup.
(() => {
  const PAGE = 20;
  const data = JSON.parse(document.getElementById("flips-data").textContent);
  const find = (id) => document.getElementById(id);
  const controls = ["before", "after", "kind", "task", "level", "seed", "words"].map((name) => find("flips-" + name));
  const [before, after, kind, task, level, seed, words] = controls;
  const collator = new Intl.Collator("en", {numeric: true});
  let found = [], first = 0;

  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const fill = (select, names) => {
    for (const [place, name] of names) {
      const option = make("option", "", name);
      option.value = place;
      select.append(option);
    }
    select.closest("label").hidden = names.length < 2;
  };
  const sorted = (names) => [...names.entries()].sort((a, b) => collator.compare(a[1], b[1]));

  const views = data.views.map((view, place) => [place, view[0]]);
  fill(before, views);
  fill(after, views);
  [before.value, after.value] = [data.before, data.after];
  fill(task, sorted(data.tasks));
  fill(level, sorted(data.levels).map(([place, name]) => [place, name || "(none)"]));
  fill(seed, [...data.seeds.entries()]);
  const most = data.problems.reduce((most, problem) => problem[5].reduce((most, answer) => answer && answer[2]
    ? answer[2].reduce((most, piece) => Math.max(most, piece[1]), most) : most, most), -1);
  if (most >= 0) find("flips-colours").append("Passes after pass 0: ");
  for (let passes = 0; passes <= most; passes++)
    find("flips-colours").append(make("span", "p" + Math.min(passes, 6), String(passes)));

  const kindOf = (a, b) => (a ? (b ? "right" : "broken") : b ? "fixed" : "wrong");
  const same = (select, value) => select.value === "" || Number(select.value) === value;

  const cut = (text) => text.match(/\s*\w+|\s*[^\w\s]|\s+/g) || [];
  // The words of two texts, each with whether it differs: whether it is outside their longest common subsequence. Of long
  // texts no word is said to differ, because finding that out takes the product of their lengths.
  const compared = (a, b) => {
    const [x, y] = [cut(a), cut(b)], most = 250000;
    if (x.length * y.length > most) return [[[a, false]], [[b, false]]];
    const length = Array.from({length: x.length + 1}, () => new Uint16Array(y.length + 1));
    for (let m = x.length - 1; m >= 0; m--)
      for (let n = y.length - 1; n >= 0; n--)
        length[m][n] = x[m] === y[n] ? length[m + 1][n + 1] + 1 : Math.max(length[m + 1][n], length[m][n + 1]);
    const [left, right] = [[], []];
    for (let m = 0, n = 0; m < x.length || n < y.length; ) {
      if (m < x.length && n < y.length && x[m] === y[n]) {
        left.push([x[m++], false]);
        right.push([y[n++], false]);
      } else if (n === y.length || (m < x.length && length[m + 1][n] >= length[m][n + 1])) left.push([x[m++], true]);
      else right.push([y[n++], true]);
    }
    return [left, right];
  };

  // A text in the largest pieces that have one number of passes (as far as these are known) and differ or do not.
  const written = (answer, words) => {
    const text = make("div", "output"), pieces = answer[2] || [];
    let piece = 0, place = 0;
    for (let [word, differs] of words) {
      while (word) {
        const rest = piece < pieces.length ? data.texts[pieces[piece][0]].length - place : word.length;
        const name = piece < pieces.length ? "p" + Math.min(pieces[piece][1], 6) : "";
        const part = word.slice(0, rest), last = text.lastChild, full = (name + (differs ? " differs" : "")).trim();
        if (last && last.className === full) last.textContent += part;
        else text.append(make("span", full, part));
        word = word.slice(part.length);
        place += part.length;
        if (piece < pieces.length && place === data.texts[pieces[piece][0]].length) [piece, place] = [piece + 1, 0];
      }
    }
    if (!text.textContent) text.append(make("em", "", "(empty)"));
    return text;
  };
  const side = (answer, view, words) => {
    const box = make("div", "side");
    const head = make("div", "head");
    head.append(make("b", answer[0] ? "right" : "wrong", answer[0] ? "right" : "wrong"));
    const passes = data.views[view][1];
    const each = passes === null ? (answer[2] ? "passes by colour" : "passes were not recorded")
      : passes ? passes + (passes === 1 ? " pass" : " passes") + " after pass 0 for each token" : "pass 0 alone";
    head.append(make("span", "", data.views[view][0]), make("small", "", each));
    box.append(head, written(answer, words));
    return box;
  };
  const card = ([problem, name]) => {
    const box = make("article", "flip"), level = data.levels[problem[1]];
    const about = [data.tasks[problem[0]], (/^[\d.]/.test(level) ? "difficulty " : "") + level,
      data.seeds.length ? "seed " + data.seeds[problem[2]] : ""];
    const head = make("h3");
    head.append(make("span", "kind " + name, name), make("span", "", about.filter(Boolean).join(" · ")));
    const expected = make("p", "expected", "Expected: ");
    expected.append(make("code", "", data.texts[problem[4]]));
    const sides = make("div", "sides");
    const views = [Number(before.value), Number(after.value)], answers = views.map((view) => problem[5][view]);
    const words = compared(...answers.map((answer) => data.texts[answer[1]]));
    answers.forEach((answer, n) => sides.append(side(answer, views[n], words[n])));
    box.append(head, make("div", "asked", data.texts[problem[3]]), expected, sides);
    return box;
  };

  const show = () => {
    const last = Math.min(first + PAGE, found.length);
    find("flips-list").replaceChildren(...found.slice(first, last).map(card));
    find("flips-place").textContent = found.length ? first + 1 + "–" + last + " of " + found.length : "none";
    find("flips-back").disabled = first === 0;
    find("flips-on").disabled = last === found.length;
  };
  const select = () => {
    const a = Number(before.value), b = Number(after.value), text = words.value.toLowerCase();
    const count = {fixed: 0, broken: 0, right: 0, wrong: 0};
    found = [];
    for (const problem of data.problems) {
      const [x, y] = [problem[5][a], problem[5][b]];
      if (!x || !y || !same(task, problem[0]) || !same(level, problem[1]) || !same(seed, problem[2])) continue;
      const places = [problem[3], problem[4], x[1], y[1]];
      if (text && !places.some((place) => data.texts[place].toLowerCase().includes(text))) continue;
      const name = kindOf(x[0], y[0]);
      count[name] += 1;
      const flipped = name === "fixed" || name === "broken";
      if (name === kind.value || (kind.value === "" && flipped)) found.push([problem, name]);
    }
    if (!text) {
      for (const [ofTask, ofLevel, ofSeed, right, asked, number] of data.alike) {
        if (asked[a] && asked[b] && same(task, ofTask) && same(level, ofLevel) && same(seed, ofSeed))
          count[right ? "right" : "wrong"] += number;
      }
    }
    const total = count.fixed + count.broken + count.right + count.wrong, net = count.fixed - count.broken;
    const points = total ? ((100 * net) / total).toFixed(1) : "0.0";
    find("flips-sum").textContent = "Of " + total.toLocaleString("en") + (text ? " that match and flipped" : "") +
      " problems: " + count.fixed.toLocaleString("en") + " fixed, " + count.broken.toLocaleString("en") + " broken" +
      (text ? "." : "; net " + (net >= 0 ? "+" : "−") + Math.abs(net) + " (" + (net >= 0 ? "+" : "−") +
      Math.abs(points).toFixed(1) + " points).");
    first = 0;
    show();
  };
  const turn = (by) => () => {
    first = Math.max(0, first + by);
    show();
    find("flips-sum").scrollIntoView();
  };

  for (const control of controls) control.addEventListener(control === words ? "input" : "change", select);
  find("flips-back").addEventListener("click", turn(-PAGE));
  find("flips-on").addEventListener("click", turn(PAGE));
  find("flips").hidden = false;
  select();
})();
