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

  // What every token took, where all took as many; else each piece of the text has the colour of its passes.
  const written = (answer) => {
    const text = make("div", "output");
    if (answer[2]) {
      for (const [piece, passes] of answer[2]) {
        const part = make("span", "p" + Math.min(passes, 6), data.texts[piece]);
        part.title = passes + (passes === 1 ? " pass" : " passes");
        text.append(part);
      }
    } else text.textContent = data.texts[answer[1]];
    if (!text.textContent) text.append(make("em", "", "(empty)"));
    return text;
  };
  const side = (answer, view) => {
    const box = make("div", "side");
    const head = make("div", "head");
    head.append(make("b", answer[0] ? "right" : "wrong", answer[0] ? "right" : "wrong"));
    const passes = data.views[view][1];
    const each = passes === null ? (answer[2] ? "passes by colour" : "passes were not recorded")
      : passes ? passes + (passes === 1 ? " pass" : " passes") + " after pass 0 for each token" : "pass 0 alone";
    head.append(make("span", "", data.views[view][0]), make("small", "", each));
    box.append(head, written(answer));
    return box;
  };
  const card = ([problem, name]) => {
    const box = make("article", "flip");
    const about = [data.tasks[problem[0]], data.levels[problem[1]] && "difficulty " + data.levels[problem[1]],
      data.seeds.length ? "seed " + data.seeds[problem[2]] : ""];
    const head = make("h3");
    head.append(make("span", "kind " + name, name), make("span", "", about.filter(Boolean).join(" · ")));
    const expected = make("p", "expected", "Expected: ");
    expected.append(make("code", "", data.texts[problem[4]]));
    const sides = make("div", "sides");
    for (const view of [Number(before.value), Number(after.value)]) sides.append(side(problem[5][view], view));
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
      if (text && ![problem[3], problem[4], x[1], y[1]].some((place) => data.texts[place].toLowerCase().includes(text))) continue;
      const name = kindOf(x[0], y[0]);
      count[name] += 1;
      if (name === kind.value || (kind.value === "" && (name === "fixed" || name === "broken"))) found.push([problem, name]);
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
