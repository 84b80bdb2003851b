// Shows `data`, which `data_page` in datasets/data_page.py makes.
const { names, colours, parts, pictures } = data;
const splits = Object.keys(parts);
const SHADES = ['#3b76d8', '#e08a1e'];  // of the parts
const UNUSUAL = '#ff2e3f';

function numbers() {
  const titles = ['part', 'images', 'without objects', 'objects', 'objects of an image', 'at most'];
  const rows = splits.map(split => [split, ...parts[split]]);
  return `<h1>Data</h1>${table(titles, rows, 'names')}
    ${join(data.warnings, text => `<p class="noted">${escaped(text)}</p>`)}`;
}

// A picture with the boxes of its objects, and `unusual` boxes over them.
function picture({ marks, name, ...image }, caption, unusual = []) {
  const known = marks.map(([box, label]) => ({ box, text: names[label], colour: colours[label] }));
  const others = unusual.map(box => ({ box, text: 'unusual', colour: UNUSUAL, dashed: true, group: '<g class="unusual">' }));
  return card(image, [...known, ...others], caption);
}

function kind({ title, number, examples, places, refused }) {
  const shown = places.filter(([key]) => pictures[key]);
  const boxes = new Map(shown.map(([key]) => [key, shown.filter(([other, box]) => other === key && box)]));
  const cards = join([...boxes], ([key, found]) =>
    picture(pictures[key], `${key.split(' ')[0]}: ${pictures[key].name}`, found.map(([, box]) => box)));
  const rest = !shown.length ? 'There is no image to show.' : number > shown.length ? `${shown.length} of ${number} are shown.` : '';
  return `<div class="${refused ? 'refused' : 'noted'}">
    <h3>${number} ${escaped(title)}</h3>
    <p>${escaped(examples.join(', '))}${number > examples.length ? ', ...' : ''}</p>
    <div class="row">${cards}</div><p>${rest}</p></div>`;
}

function kinds() {
  const [refused, noted] = [true, false].map(which => data.kinds.filter(one => one.refused === which));
  return `${refused.length ? '<h2>A run would stop at these</h2>' : ''}${join(refused, kind)}
    <h2>Unusual</h2>
    ${noted.length ? '<p>Kept, repaired or left out. A dashed box is what is meant.</p>' : '<p>Nothing was found.</p>'}
    ${join(noted, kind)}`;
}

function classes() {
  const titles = ['class', ...splits.flatMap(split => [`${split} objects`, `${split} images`])];
  const totals = splits.flatMap(split => [parts[split][2], parts[split][0] - parts[split][1]]);
  return `<h2>Classes</h2><p>A click on a title sorts.</p>
    ${table(titles, [...data.classes, ['all classes', ...totals]], 'names sort')}`;
}

function histogram({ title, unit, bins, counts }) {
  const shares = counts.map(row => row.map(count => count / Math.max(sum(row), 1)));
  const most = Math.max(...shares.flat(), 1e-9);
  const line = (name, at) => `<tr><td>${name}</td><td style="width:180px">
    ${join(shares, (row, part) => `<span title="${splits[part]}: ${counts[part][at]}">${bar(row[at] / most, SHADES[part])}</span>`)}</td>
    <td>${shares.map(row => percent(row[at])).join(' / ')} %</td></tr>`;
  return `<div><h3>${title}</h3><p>${unit}</p><table class="bars">${join(bins, line)}</table></div>`;
}

function histograms() {
  const chips = join(splits, (split, at) => `<i style="background:${SHADES[at]}"></i>${escaped(split)} `);
  return `<h2>Boxes</h2><p>${chips}</p><div class="row">${join(data.histograms, histogram)}</div>`;
}

function samples() {
  const pair = ({ part, stored, seen }) => `<div class="pair">${picture(pictures[stored], `${part}: ${pictures[stored].name}`)}
    ${picture(seen, `as the run sees it: ${seen.size.join(' x ')}`)}</div>`;
  return `<h2>Samples</h2><p>As they are stored and, beside it, as the run sees them. A click enlarges.</p>
    <div class="row">${join(data.samples, pair)}</div>`;
}

show('Data', numbers() + kinds() + classes() + histograms() + samples());
