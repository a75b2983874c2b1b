// Drives a server with OpenAI's own client for Node: `node openai.mjs BASE_URL BASE_MODEL`. Fails by an exception.
import assert from "node:assert/strict";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import OpenAI, { BadRequestError, NotFoundError } from "openai";

const [baseURL, base] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const options = { max_tokens: 24, temperature: 0 };
const say = (content) => [{ role: "user", content }];
const ask = say("Show the name of all ships.");
const count = say("Count: one, one, one, one.");
const chat = (more) => client.chat.completions.create({ model: base, messages: ask, ...options, ...more });
const text = async (more) => (await chat(more)).choices[0].message.content;

async function models() {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  assert.deepEqual(ids, [base]);
  assert.equal((await client.models.retrieve(base)).id, base);
}

async function chats() {
  const whole = await text({ model: "sql" });
  assert.match(whole, /^SELECT name/);
  let streamed = "";
  let usage;
  const stream = await chat({ model: "sql", stream: true, stream_options: { include_usage: true } });
  for await (const part of stream) {
    streamed += part.choices[0]?.delta.content ?? "";
    usage = part.usage ?? usage;
  }
  assert.equal(streamed, whole);
  assert.ok(usage.completion_tokens > 0);
  const runner = client.chat.completions.stream({ model: "sql", messages: ask, ...options });
  const final = await runner.finalChatCompletion();
  assert.equal(final.choices[0].message.content, whole);
  const scored = (await chat({ logprobs: true, top_logprobs: 2 })).choices[0].logprobs.content;
  assert.ok(scored.every((token) => token.top_logprobs.length === 2));
  const drawn = await chat({ n: 3, temperature: 1.5, seed: 1 });
  assert.equal(new Set(drawn.choices.map((choice) => choice.message.content)).size, 3);
}

// Each argument that changes an answer, and what is beside it with and without it.
async function argumentsChangeAnswers() {
  const draw = { temperature: 1.9, seed: 5, max_tokens: 12 };
  for (const [name, value, beside] of [
    ["frequency_penalty", 2, { messages: count }],
    ["presence_penalty", 2, { messages: count }],
    ["logit_bias", { 28: 100 }, {}],
    ["max_completion_tokens", 2, { max_tokens: undefined }],
    ["max_tokens", 2, {}],
    ["model", "sql", {}],
    ["seed", 6, { ...draw, seed: 5 }],
    ["stop", [" "], {}],
    ["temperature", 1.9, { seed: 5 }],
    ["top_p", 0.01, draw],
    ["min_tokens", 9, { stop: [" "] }],
  ]) {
    assert.notEqual(await text({ ...beside, [name]: value }), await text(beside), `${name} changes nothing`);
  }
  const plain = await text({});
  for (const hint of [{ user: "a" }, { store: true }, { metadata: { a: "b" } }, { verbosity: "low" }]) {
    assert.equal(await text(hint), plain);
  }
}

async function structured() {
  const schema = z.object({ kind: z.enum(["sail", "steam"]), fast: z.boolean() });
  const response_format = zodResponseFormat(schema, "ship");
  const request = { model: base, messages: say("Describe a ship."), ...options, max_tokens: 64, response_format };
  const answer = await client.chat.completions.parse(request);
  assert.ok(schema.safeParse(answer.choices[0].message.parsed).success);
}

async function completions() {
  const prompt = "one one one one one one";
  const create = (more) => client.completions.create({ model: base, prompt, ...options, ...more });
  const one = (await create({})).choices[0].text;
  let streamed = "";
  for await (const part of await create({ stream: true })) streamed += part.choices[0].text;
  assert.equal(streamed, one);
  assert.equal((await create({ echo: true })).choices[0].text, prompt + one);
  assert.equal((await create({ prompt: [prompt, "Hello"] })).choices[0].text, one);
  assert.equal((await create({ n: 2, best_of: 4, temperature: 1.5 })).choices.length, 2);
  assert.equal((await create({ logprobs: 2 })).choices[0].logprobs.tokens.join(""), one);
  assert.notEqual((await create({ stop: " " })).choices[0].text, one);
}

async function refusals() {
  await assert.rejects(chat({ model: "no-such-adapter" }), (error) => error instanceof NotFoundError && error.code === "model_not_found");
  await assert.rejects(chat({ temperature: -1 }), (error) => error instanceof BadRequestError && error.param === "temperature");
  await assert.rejects(chat({ messages: say("long ".repeat(10_000)) }), (error) => error.code === "context_length_exceeded");
  await assert.rejects(chat({ no_such_field: 1 }), (error) => error.param === "no_such_field");
}

for (const part of [models, chats, argumentsChangeAnswers, structured, completions, refusals]) await part();
