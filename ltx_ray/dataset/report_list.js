// The list of clips of a large dataset. Only the rows that can be seen are elements of the page.
(function () {
  "use strict";
  var box = document.querySelector(".controls"), list = document.querySelector(".list");
  var data = JSON.parse(document.getElementById("listed").textContent);
  var HEIGHT = 144, MARGIN = 12;  // pixels of a row, and rows that are made beyond the window
  var words = box.querySelector("input"), flag = box.querySelector("[name=flag]");
  var sort = box.querySelector("[name=sort]"), format = box.querySelector("[name=size]"), out = box.querySelector("output");
  var status = box.querySelector("[name=status]"), time = box.querySelector("[name=time]");
  // Rows from `rendered` on have failed, and have neither clip nor picture.
  var count = data.id.length, rendered = data.rendered, newest = 0, order = new Uint32Array(count), ranks = {}, texts = null, made = new Map(), due = false;
  for (var i = 0; i < count; i++) { order[i] = i; newest = Math.max(newest, data.done[i]); }

  function element(kind, name, text) {
    var made = document.createElement(kind);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  }
  // Links that were signed differ in their ends alone.
  function place(folder, item, ending, n) {
    var path = folder + "/" + item.slice(0, 2) + "/" + item + ending, signed = data.signed;
    return signed ? signed.base + path + signed.query + signed[folder][n] : path;
  }
  function told(measure, value) {
    var digits = { minimumFractionDigits: measure.digits, maximumFractionDigits: measure.digits };
    return measure.title + " " + value.toLocaleString("en-US", digits) + (measure.unit ? " " + measure.unit : "");
  }
  function row(n) {
    var item = data.item[n], frames = data.frames[n], rate = data.rate[n];
    var line = element("article", "line"), body = element("div", "body"), head = element("div", "row"), title = element("h3");
    line.dataset.n = n;
    head.append(title);
    if (n < rendered) {
      var href = data.clip[n] || place("clips", item, ".mp4", n);
      var link = element("a", "thumb"), image = element("img"), name = element("a", "", data.id[n]);
      link.href = name.href = href;
      link.tabIndex = -1;
      image.alt = "frames of " + data.id[n];
      image.decoding = "async";
      image.onerror = function () { image.remove(); };
      image.src = place("thumbs", item, ".webp", n);
      link.append(image);
      title.append(name);
      line.append(link);
    } else {
      title.textContent = data.id[n];
      head.append(element("span", "badge bad", data.statuses[data.status[n - rendered]]));
    }
    data.flags[n].forEach(function (f) { head.append(element("span", "badge warn", data.names[f].replaceAll("_", " "))); });
    var prompt = element("p", "prompt", data.prompt[n]);
    prompt.dir = "auto";
    var facts = [data.width[n] + " × " + data.height[n], frames + " frames", "seed " + data.seed[n],
      data.work[n].toFixed(1) + " s of work"];
    if (rate) facts.splice(2, 0, (frames / rate).toFixed(2) + " s");
    var last = n < rendered ? element("p", "small soft", facts.join(" · ")) : element("p", "small why", data.why[n - rendered]);
    last.dir = "auto";
    body.append(head, prompt, last);
    var known = data.measures.filter(function (m) { return m.values[n] != null; });
    if (known.length) {
      var measures = element("p", "small soft measures", known.map(function (m) { return told(m, m.values[n]); }).join(" · "));
      measures.title = measures.textContent;  // A narrow window cuts it off.
      body.append(measures);
    }
    line.append(body);
    return line;
  }
  function draw() {
    due = false;
    var top = Math.max(0, -list.getBoundingClientRect().top);
    var first = Math.max(0, Math.floor(top / HEIGHT) - MARGIN);
    var last = Math.min(order.length, Math.ceil((top + innerHeight) / HEIGHT) + MARGIN);
    made.forEach(function (line, at) {
      if (at < first || at >= last) { line.remove(); made.delete(at); }
    });
    for (var at = first; at < last; at++) {
      if (made.has(at)) continue;
      var line = row(order[at]);
      line.style.top = at * HEIGHT + "px";
      made.set(at, line);
      list.append(line);
    }
  }
  function soon() { if (!due) { due = true; requestAnimationFrame(draw); } }
  function again(total) {
    made.forEach(function (line) { line.remove(); });
    made.clear();
    list.style.height = order.length * HEIGHT + "px";
    out.textContent = order.length === total ? "" : order.length + " of " + total + " shown";
    draw();
  }
  function pixels(n) { return data.width[n] * data.height[n] * data.frames[n]; }
  // The place of each clip in an order, made when that order is first asked for.
  function ranked(key) {
    if (!ranks[key]) {
      var by = Array.from({ length: count }, function (_, n) { return n; });
      if (key === "id") by.sort(function (a, b) { return data.id[a] < data.id[b] ? -1 : data.id[a] > data.id[b] ? 1 : a - b; });
      else if (key === "size") by.sort(function (a, b) { return pixels(b) - pixels(a) || a - b; });
      else {
        // "+motion" is the least first. Clips of which it is not known come last.
        var measure = data.measures.find(function (m) { return m.column === key.slice(1); });
        var values = measure ? measure.values : data[key], sign = key[0] === "+" ? 1 : -1;
        by.sort(function (a, b) {
          var x = values[a], y = values[b];
          return (x == null) - (y == null) || sign * (x - y) || a - b;
        });
      }
      ranks[key] = Uint32Array.from(by);
    }
    return ranks[key];
  }
  function filter() {
    var wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean), value = flag.value, from = sort.value && ranked(sort.value);
    var of = format.value.split("x").map(Number), sized = of.length === 2;
    var number = data.names.indexOf(value.slice(1)), kept = new Uint32Array(count), size = 0, total = 0;
    var wants = status.value, cause = wants.length > 1 ? Number(wants.slice(1)) : null, since = time.value ? newest - Number(time.value) : 0;
    if (wanted.length && !texts) texts = data.id.map(function (id, n) {
      var why = n < rendered ? "" : data.why[n - rendered] + " ";
      return (id + " " + data.prompt[n] + " " + why + data.flags[n].map(function (f) { return data.names[f]; }).join(" ")).toLowerCase();
    });
    for (var at = 0; at < count; at++) {
      var n = from ? from[at] : at, flags = data.flags[n];
      if (wants && (wants === "+") !== (n < rendered)) continue;
      if (cause !== null && data.status[n - rendered] !== cause) continue;
      total++;
      if (since && data.done[n] < since) continue;
      if (sized && (data.width[n] !== of[0] || data.height[n] !== of[1])) continue;
      if (value && !(value === "*" ? flags.length : flags.includes(number))) continue;
      if (wanted.length && !wanted.every(function (w) { return texts[n].includes(w); })) continue;
      kept[size++] = n;
    }
    order = kept.subarray(0, size);
    again(total);
  }
  words.addEventListener("input", filter);
  flag.addEventListener("change", filter);
  format.addEventListener("change", filter);
  status.addEventListener("change", filter);
  time.addEventListener("change", filter);
  sort.addEventListener("change", filter);
  addEventListener("scroll", soon, { passive: true });
  addEventListener("resize", soon, { passive: true });
  box.hidden = false;
  filter();
})();
