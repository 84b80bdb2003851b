// Shows `data`, the report of `analyze` in tools/analyze_errors.py.
// Rows of tables are classes; the last one is all of them.
const { names, kinds, iou } = data;
const K = names.length - 1;
const MISSED = 5, FOUND = 6;  // of `kinds`; those before are false positives
const COLOURS = ['#ff4d55', '#ff9a2e', '#e06bff', '#5b9bff', '#ffe14d', '#29e0ee', '#4fe063'];
const METRICS = ['AP', 'AP50', 'AP75', 'AR100'];
const SIZES = ['small', 'medium', 'large'];
const MEANINGS = [
  `IoU of ${iou} or more with an object of another class`,
  `IoU from 0.1 to ${iou} with an object of its class`,
  `IoU from 0.1 to ${iou} with an object of another class`,
  'its object has a detection of a higher score',
  'IoU under 0.1 with every object',
  'object without a detection of its class',
];

const withSums = rows => [...rows, rows[0].map((_, column) => sum(rows.map(row => row[column])))];
const [objects, missed, wrong] = [data.objects, data.missed, data.false].map(withSums);
const errors = [...wrong[K], sum(missed[K])];

function chip(kind, tag = 'button') {
  return `<${tag} data-kind="${kind}"><i style="background:${COLOURS[kind]}"></i>${kinds[kind]}</${tag}>`;
}

// The best F1 of a class: F1, score, precision and recall as text.
function best(row) {
  const [score, precision, recall, f1] = data.curves[row].best || [];
  if (score === undefined) return ['-', '-', '-', '-'];
  return [percent(f1), score.toFixed(5), percent(precision), percent(recall)];
}

function summary() {
  const total = sum(objects[K]);
  const silent = data.silent ? `The file has no detection in ${data.silent} of the images.` : '';
  return `<h1>Errors of ${escaped(data.title)}</h1>
    <p>${data.images} images, ${total} objects. At IoU ${iou} and from score ${+data.threshold.toFixed(5)} on:
    ${total - errors[MISSED]} found, ${sum(wrong[K])} false positives, ${errors[MISSED]} missed. ${silent}</p>
    <h2>Average precision</h2>${table(Object.keys(data.stats), [Object.values(data.stats).map(percent)])}`;
}

function classTable() {
  const titles = ['class', 'objects', ...METRICS, 'best F1', 'at score', 'precision', 'recall'];
  const rows = names.map((name, row) => {
    const numbers = data.classes[row] || data.stats;
    return [name, sum(objects[row]), ...METRICS.map(metric => percent(numbers[metric])), ...best(row)];
  });
  return `<h2>Classes</h2>
    <p>Best F1 at IoU ${iou}, and the lowest score of the detections that give it. A click on a title sorts.</p>
    ${table(titles, rows, 'names sort')}`;
}

function kindTables() {
  const most = Math.max(...errors, 1);
  const bars = join(errors, (number, kind) => `<tr><td>${chip(kind)}</td><td>${number}</td>
    <td style="width:200px">${bar(number / most, COLOURS[kind])}</td>
    <td>${MEANINGS[kind]}</td></tr>`);
  const sizes = SIZES.map((size, at) => {
    const [number, lost] = [objects[K][at], missed[K][at]];
    return [size, number, lost, percent(number ? lost / number : -1)];
  });
  const titles = ['class', 'objects', ...kinds.slice(0, FOUND), ...SIZES.map(size => `${size} missed`)];
  const rows = names.map((name, row) =>
    [name, sum(objects[row]), ...wrong[row], sum(missed[row]), ...missed[row]]);
  return `<h2>Kinds of errors</h2>
    <p>A click on a kind shows its images below. An object with a detection in the wrong place can be missed, too.</p>
    <div class="row"><table class="bars">${bars}</table>${table(['size', 'objects', 'missed', '%'], sizes, 'names')}</div>
    <p></p>${table(titles, rows, 'names sort')}`;
}

function confusionMatrix() {
  const row = (numbers, at) => {
    const name = escaped(at < K ? names[at] : 'background'), total = sum(numbers) || 1;
    const cell = (count, to) => `<td title="${name}: ${escaped(to < K ? names[to] : 'missed')}"
      style="background:rgba(${at === to ? '40,180,80' : '240,50,60'},${.9 * count / total})">${count || ''}</td>`;
    return `<tr><td>${name}</td>${join(numbers, cell)}</tr>`;
  };
  const titles = join([...names.slice(0, K), 'missed'], name => `<th><span>${escaped(name)}</span></th>`);
  return `<h2>Confusion matrix</h2>
    <p>An object counts once, for the detection of the highest score that overlaps it. Others are in the row of the background.</p>
    <div class="wide"><table class="names matrix"><tr><th>object \\ detected as</th>${titles}</tr>
    ${join(data.confusion, row)}</table></div>`;
}

// A curve of each class; `across` and `up` are places in a point: score, precision, recall, F1.
function plot(across, up, titles) {
  const x = share => (45 + 340 * Math.min(Math.max(share, 0), 1)).toFixed(1);
  const y = share => (275 - 260 * share).toFixed(1);
  const grid = join([0, .2, .4, .6, .8, 1], tick => `<path d="M45 ${y(tick)}H385M${x(tick)} 15V275"/>
    <text x="${x(tick)}" y="291">${tick}</text><text x="30" y="${+y(tick) + 4}">${tick}</text>`);
  const curve = ({ points, best }, row) => `<g data-class="${row}">
    <polyline points="${points.map(point => `${x(point[across])},${y(point[up])}`).join(' ')}"/>
    ${best ? `<circle r="4" cx="${x(best[across])}" cy="${y(best[up])}"/>` : ''}</g>`;
  return `<svg class="plot" viewBox="0 0 400 312">${grid}
    <text x="215" y="307">${titles[0]}</text>
    <text x="-145" y="13" transform="rotate(-90)">${titles[1]}</text>
    ${join(data.curves, curve)}</svg>`;
}

function curves() {
  return `<h2>Precision, recall and F1</h2>
    <p><select>${join(names, (name, row) => `<option value="${row}">${escaped(name)}</option>`)}</select>
    <span id="note"></span></p>
    <div class="row">${plot(2, 1, ['recall', 'precision'])}${plot(0, 3, ['score', 'F1'])}</div>`;
}

// An image with its marks: [box, kind, text].
function errorCard(image) {
  const marks = image.marks.map(([box, kind, text]) => ({
    box, text, title: `${text}: ${kinds[kind]}`, colour: COLOURS[kind], dashed: kind === MISSED,
    group: `<g data-mark="${kind}" class="${kinds[kind]}">`,
  }));
  return card(image, marks, `errors: ${sum(image.errors)} in ${image.name}`, `data-errors="${image.errors}"`);
}

function worstImages() {
  return `<h2>Worst images</h2>
    <div id="chips">${join([...errors.keys()], kind => chip(kind))} ${chip(FOUND, 'span')}. <span id="number"></span>
    A click enlarges.</div>
    <div class="row">${join(data.worst, errorCard)}</div>`;
}

const setText = (id, text) => { document.getElementById(id).textContent = text; };
let chosen;  // kind whose images are shown; undefined: all

// Show the images with errors of a kind, those with most first; the second click on a kind shows all again.
function filter(kind) {
  chosen = chosen === kind ? undefined : kind;
  every('button', one => one.classList.toggle('on', one.dataset.kind === chosen));
  every('.card', one => {
    const counts = one.dataset.errors.split(',').map(Number), count = chosen ? counts[chosen] : sum(counts);
    one.hidden = !count;
    one.style.order = -count;
  });
  every('[data-mark]', one => {
    const shown = !chosen || one.dataset.mark === chosen || +one.dataset.mark >= MISSED;
    one.style.display = shown ? '' : 'none';
  });
  const number = document.querySelectorAll('.card:not([hidden])').length;
  setText('number', `${number} of ${data.worst.length} images are shown.`);
}

function select(row) {
  every('[data-class]', one => one.classList.toggle('on', one.dataset.class === row));
  every('.plot .on', one => one.parentNode.append(one));  // over the others
  const [f1, score, precision, recall] = best(row);
  setText('note', `best F1 ${f1} from score ${score} on, with precision ${precision} and recall ${recall}`);
}

show('Errors', summary() + classTable() + kindTables() + confusionMatrix() + curves() + worstImages());
every('button', one => {
  one.onclick = () => {
    filter(one.dataset.kind);
    if (one.closest('.bars')) document.getElementById('chips').scrollIntoView();
  };
});
every('select', one => {
  one.onchange = () => select(one.value);
  one.value = K;
  one.onchange();
});
filter();
