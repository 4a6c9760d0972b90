// Drives ComfyUI's own page in a headless Chromium: runs one workflow, opens all of them, reads help pages, draws nodes.
// Argument: a file with {server, chromium, playwright, workflows: [{name, content}], run, screenshot, dropped, nodes, pictures}.
// Says what it saw as one JSON object on its last line; it judges nothing.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const task = JSON.parse(readFileSync(process.argv[2], "utf8"));
const { chromium } = createRequire(task.playwright + "/")("playwright-core");
const FLAGS = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
  "disable-component-update", "disable-sync", "disable-dev-shm-usage", "force-color-profile=srgb"];
const SCALE = 1.25, LEFT = 60, ABOVE = 200; // where a node alone is drawn, clear of the page's own bars

const browser = await chromium.launch({ executablePath: task.chromium, args: FLAGS.map((flag) => "--" + flag) });
const page = await browser.newPage({ viewport: { width: 1600, height: 900 } });
page.setDefaultTimeout(120000);
const errors = [];
page.on("pageerror", (error) => errors.push(String(error)));
await page.route("**", (route) => // the page needs nothing from outside
  new URL(route.request().url()).hostname === "127.0.0.1" ? route.continue() : route.abort());
await page.addInitScript(() => localStorage.setItem("vueNodesBannerDismissed", "true")); // news of the page's own
await page.goto(task.server);
await page.waitForFunction(() => window.app?.graph && window.app?.extensionManager);
await page.waitForTimeout(2500);
await closeDialogs(); // newer pages greet with templates

const seen = { ran: await run(task.workflows.find(({ name }) => name === task.run)), opened: {}, helped: {}, errors };
for (const { name, content } of task.workflows) seen.opened[name] = await open(name, content);
seen.named = await name(task.workflows.find(({ name }) => name === "save_clip"), "%date:yyyy%/%Lockstep Sampler.seed%");
seen.dropped = await drop(task.dropped);
if (task.pictures) await drawNodes();
for (const type of task.nodes) seen.helped[type] = await help(type);
await browser.close();
console.log(JSON.stringify(seen));

async function open(name, content) {
  await page.evaluate(([json, title]) => window.app.loadGraphData(json, true, true, title), [content, name]);
  await page.waitForTimeout(500);
  const opened = await page.evaluate(async () => {
    const { output } = await window.app.graphToPrompt();
    const complaints = [...document.querySelectorAll(".p-toast-message, .p-dialog")].map((e) => e.innerText);
    const broken = window.app.graph.nodes.filter((node) => node.has_errors).map((node) => node.type);
    return { output, complaints, broken };
  });
  if (opened.complaints.length) await closeDialogs(); // read, or it would cover what comes next
  return opened;
}

async function closeDialogs() {
  const dialogs = page.locator('.p-dialog, [role="dialog"]:visible');
  if (!(await dialogs.count())) return;
  await page.keyboard.press("Escape");
  await dialogs.first().waitFor({ state: "hidden" });
}

// what the page makes of a file's name
async function name(workflow, prefix) {
  await open(workflow.name, workflow.content);
  return page.evaluate(async (text) => {
    const saving = window.app.graph.nodes.find(({ type }) => type === "LockstepSaveClip");
    saving.widgets.find(({ name }) => name === "filename_prefix").value = text;
    return (await window.app.graphToPrompt()).output[saving.id].inputs.filename_prefix;
  }, prefix);
}

// what the page makes of a clip that is dropped on it
async function drop(file) {
  await page.evaluate(async (base64) => {
    window.app.graph.clear();
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    await window.app.handleFile(new File([bytes], "clip.mp4", { type: "video/mp4" }));
  }, file);
  await page.waitForTimeout(1000);
  return page.evaluate(() => window.app.graph.nodes.map((node) => node.type).sort());
}

async function run({ name, content }) {
  await open(name, content);
  await page.evaluate(() => {
    window.heard = {};
    for (const event of ["execution_success", "execution_error", "b_preview_with_metadata", "progress"])
      window.app.api.addEventListener(event, () => (window.heard[event] = (window.heard[event] ?? 0) + 1));
  });
  const button = page.locator('button[data-testid="queue-button"]'); // where it is one; once it was a group
  const group = page.locator('[data-testid="queue-button"] button, .queue-button-group button');
  await ((await button.count()) ? button : group).first().click();
  await page.waitForFunction(() => window.heard.execution_success || window.heard.execution_error, null, { timeout: 300000 });
  await page.evaluate(showAll);
  await page.waitForTimeout(2500);
  await page.waitForFunction(() => !/jobs? completed/.test(document.body.innerText)); // goes after a while, by itself
  const news = await page.evaluate(() => /Introducing|jobs? completed/.test(document.body.innerText));
  await page.screenshot({ path: task.screenshot, type: "jpeg", quality: 85 });
  return page.evaluate((news) => ({
    news,
    heard: window.heard,
    outputs: window.app.nodeOutputs,
    color: window.app.canvas.constructor.link_type_colors["LOCKSTEP_MODEL"],
    style: getComputedStyle(document.body).getPropertyValue("--color-datatype-LOCKSTEP_MODEL"),
  }), news);
}

function showAll() {
  const { graph, canvas } = window.app;
  const left = Math.min(...graph.nodes.map(({ pos }) => pos[0])), top = Math.min(...graph.nodes.map(({ pos }) => pos[1]));
  const right = Math.max(...graph.nodes.map(({ pos, size }) => pos[0] + size[0]));
  const bottom = Math.max(...graph.nodes.map(({ pos, size }) => pos[1] + size[1]));
  canvas.ds.scale = Math.min(1500 / (right - left), 690 / (bottom - top), 1);
  canvas.ds.offset = [80 / canvas.ds.scale - left, 185 / canvas.ds.scale - top];
  canvas.setDirty(true, true);
}

async function help(type) {
  const address = await page.evaluate((type) => window.LiteGraph.registered_node_types[type].nodeData.python_module, type);
  return page.evaluate(async ([type, address]) => {
    const base = `/extensions/${address.split(".")[1]}/docs/`;
    const text = await (await fetch(`${base}${type}.md`)).text();
    const pictures = [...text.matchAll(/!\[.*?\]\((.*?)\)/g)].map((match) => base + match[1]);
    const widths = pictures.map((source) => new Promise((done) => {
      const image = new Image();
      image.onload = () => done(image.naturalWidth);
      image.onerror = () => done(0);
      image.src = source;
    }));
    return { title: text.split("\n")[0], widths: await Promise.all(widths) };
  }, [type, address]);
}

async function drawNodes() {
  await page.setViewportSize({ width: 1000, height: 1100 });
  for (const type of task.nodes) {
    const box = await page.evaluate(([type, scale, left, above]) => {
      const { graph, canvas } = window.app;
      graph.clear();
      const node = window.LiteGraph.createNode(type);
      graph.add(node);
      node.pos = [0, 0];
      node.size = [380, Math.max(node.size[1], type === "LockstepTextEncode" ? 200 : 0)];
      canvas.ds.scale = scale;
      canvas.ds.offset = [left, above];
      canvas.setDirty(true, true);
      const [wide, high] = node.size;
      return { x: left * scale - 16, y: (above - 30) * scale - 16, width: wide * scale + 32, height: (high + 30) * scale + 32 };
    }, [type, SCALE, LEFT, ABOVE]);
    await page.waitForTimeout(600);
    await page.screenshot({ path: `${task.pictures}/${type}.jpg`, type: "jpeg", quality: 80, clip: box });
  }
}
