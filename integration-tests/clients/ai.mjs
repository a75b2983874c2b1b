// Drives a server with the Vercel AI SDK: `node ai.mjs BASE_URL BASE_MODEL`. Fails by an exception.
import assert from "node:assert/strict";
import { APICallError, Output, generateText, streamText } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { z } from "zod";

const [baseURL, base] = process.argv.slice(2);
const prompt = "Show the name of all ships.";
const openai = createOpenAI({ baseURL, apiKey: "none" });
const compatible = createOpenAICompatible({ name: "lorax", baseURL, includeUsage: true });
const options = { temperature: 0, maxOutputTokens: 24, maxRetries: 0 };

// Chats, by both of its providers.
async function chats(model) {
  const ask = (more) => generateText({ model: model(base), prompt, ...options, ...more });
  const sql = await ask({ model: model("sql") });
  assert.match(sql.text, /^SELECT name/);
  assert.equal(sql.finishReason, "stop");
  assert.ok(sql.usage.inputTokens > 0 && sql.usage.outputTokens > 0);
  const streamed = streamText({ model: model("sql"), prompt, ...options });
  let text = "";
  for await (const part of streamed.textStream) text += part;
  assert.equal(text, sql.text);
  assert.equal((await streamed.usage).outputTokens, sql.usage.outputTokens);
  const talk = [{ role: "user", content: [{ type: "text", text: prompt }] }];
  assert.equal((await ask({ model: model("sql"), prompt: undefined, system: undefined, messages: talk })).text, sql.text);
  const plain = (await ask({})).text;
  for (const [name, more] of [
    ["system", { system: "Answer in one word." }],
    ["maxOutputTokens", { maxOutputTokens: 2 }],
    ["stopSequences", { stopSequences: [" "] }],
    ["temperature and seed", { temperature: 1.9, seed: 5 }],
    ["topP", { temperature: 1.9, seed: 5, topP: 0.9 }],
  ]) {
    assert.notEqual((await ask(more)).text, plain, `${name} changes nothing`);
  }
  const count = "Count: one, one, one, one.";
  for (const name of ["presencePenalty", "frequencyPenalty"]) {
    assert.notEqual((await ask({ prompt: count, [name]: 2 })).text, (await ask({ prompt: count })).text, `${name} changes nothing`);
  }
  const draw = { temperature: 1.9, maxOutputTokens: 12 };
  assert.equal((await ask({ ...draw, seed: 1 })).text, (await ask({ ...draw, seed: 1 })).text);
  assert.notEqual((await ask({ ...draw, seed: 1 })).text, (await ask({ ...draw, seed: 2 })).text);
  await assert.rejects(ask({ model: model("no-such-adapter") }), (error) => APICallError.isInstance(error) && error.statusCode === 404);
  await assert.rejects(ask({ prompt: "long ".repeat(10_000) }), /maximum context length/);
}

async function structured(model) {
  const schema = z.object({ kind: z.enum(["sail", "steam"]), fast: z.boolean() });
  const output = Output.object({ schema });
  const answer = await generateText({ model, prompt: "Describe a ship.", ...options, maxOutputTokens: 64, output });
  assert.ok(schema.safeParse(answer.output).success);
}

async function completions(model) {
  const ask = (more) => generateText({ model: model(base), prompt, ...options, ...more });
  const whole = (await ask({})).text;
  let text = "";
  for await (const part of streamText({ model: model(base), prompt, ...options }).textStream) text += part;
  assert.equal(text, whole);
}

async function providerOptions() {
  const ask = (more) => generateText({ model: openai.chat(base), prompt, ...options, providerOptions: { openai: more } });
  const plain = (await ask({})).text;
  assert.notEqual((await ask({ logitBias: { 28: 100 } })).text, plain, "logitBias changes nothing");
  assert.notEqual((await ask({ maxCompletionTokens: 2 })).text, plain, "maxCompletionTokens changes nothing");
  const scored = await ask({ logprobs: 2 });
  assert.ok(scored.providerMetadata.openai.logprobs.every((token) => token.top_logprobs.length === 2));
  for (const hint of [{ user: "a" }, { store: false }, { metadata: { a: "b" } }, { serviceTier: "auto" }, { promptCacheKey: "a" }, { safetyIdentifier: "a" }, { textVerbosity: "low" }, { parallelToolCalls: false }]) {
    assert.equal((await ask(hint)).text, plain, JSON.stringify(hint));
  }
}

await chats((id) => openai.chat(id));
await chats((id) => compatible.chatModel(id));
await structured(openai.chat(base));
await structured(createOpenAICompatible({ name: "lorax", baseURL, supportsStructuredOutputs: true }).chatModel(base));
await completions((id) => openai.completion(id));
await completions((id) => compatible.completionModel(id));
await providerOptions();
