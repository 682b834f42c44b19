// Vercel's AI SDK by both of its providers: text, streams, objects, tools, and tools of every type that zod has.
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateObject, generateText, stepCountIs, streamObject, streamText, tool } from 'ai';
import { z } from 'zod';
import { apiKey, baseURL, check, expect, model } from './check.mjs';

globalThis.AI_SDK_LOG_WARNINGS = false;
const compatible = createOpenAICompatible({ name: 'lorapool', baseURL, apiKey, includeUsage: true, supportsStructuredOutputs: true });
const openai = createOpenAI({ baseURL, apiKey });
const ask = { maxOutputTokens: 60, temperature: 0, maxRetries: 0, prompt: 'Say hello.' };
const Person = z.object({ name: z.string().max(10), age: z.number().int().min(0).max(150) });
const weather = tool({ description: 'd', inputSchema: z.object({ city: z.string().max(10) }), execute: async ({ city }) => ({ city }) });
const stateless = { providerOptions: { openai: { store: false } } };

const Node = z.object({ v: z.number(), get child() { return z.nullable(Node); } });
const TYPES = {
  any: z.object({ a: z.any(), b: z.unknown() }),
  array: z.object({ a: z.array(z.string()) }),
  base64: z.object({ a: z.base64() }),
  cidr: z.object({ a: z.cidrv4() }),
  cuid2: z.object({ a: z.cuid2() }),
  datetime: z.object({ a: z.iso.datetime() }),
  default: z.object({ a: z.number().default(3) }),
  'discriminated union': z.object({
    a: z.discriminatedUnion('k', [z.object({ k: z.literal('a') }), z.object({ k: z.literal('b'), n: z.number() })]),
  }),
  duration: z.object({ a: z.iso.duration() }),
  e164: z.object({ a: z.e164() }),
  email: z.object({ a: z.email() }),
  emoji: z.object({ a: z.emoji() }),
  empty: z.object({}),
  enum: z.object({ a: z.enum(['x', 'y']) }),
  guid: z.object({ a: z.guid() }),
  int: z.object({ a: z.int() }),
  ipv4: z.object({ a: z.ipv4() }),
  jwt: z.object({ a: z.jwt() }),
  'recursive object': Node,
  'literal union': z.object({ a: z.union([z.literal('x'), z.literal(2)]) }),
  loose: z.looseObject({ a: z.string() }),
  lowercase: z.object({ a: z.string().lowercase() }),
  nanoid: z.object({ a: z.nanoid() }),
  never: z.object({ a: z.never().optional() }),
  nullable: z.object({ a: z.string().nullable() }),
  record: z.object({ r: z.record(z.string(), z.number()) }),
  'regex \\d': z.object({ a: z.string().regex(/^\d+$/) }),
  'regex with look-ahead': z.object({ a: z.string().regex(/^(?!-)[a-z]+$/) }),
  startsWith: z.object({ a: z.string().startsWith('x') }),
  time: z.object({ a: z.iso.time() }),
  tuple: z.object({ a: z.tuple([z.string(), z.number()]) }),
  url: z.object({ a: z.url() }),
  uuid: z.object({ a: z.uuid() }),
};

const providers = { 'openai-compatible': [compatible(model), {}], 'openai chat': [openai.chat(model), {}], 'openai responses': [openai(model), stateless] };
for (const [provider, [served, options]] of Object.entries(providers)) {
  const own = { model: served, ...ask, ...options };
  await check(`${provider}: generateText`, async () => {
    const { usage } = await generateText(own);
    expect(usage.outputTokens > 0, usage);
  });
  await check(`${provider}: streamText with usage`, async () => {
    const stream = streamText({ ...own, onError() {} });
    for await (const part of stream.fullStream) if (part.type === 'error') throw part.error;
    expect((await stream.usage).outputTokens > 0, await stream.usage);
  });
  await check(`${provider}: generateObject`, async () => {
    const { object } = await generateObject({ ...own, maxOutputTokens: 150, schema: Person });
    expect(Person.safeParse(object).success, object);
  });
  await check(`${provider}: streamObject`, async () => {
    const stream = streamObject({ ...own, maxOutputTokens: 150, schema: Person, onError() {} });
    let parts = 0;
    for await (const _ of stream.partialObjectStream) parts++;
    expect(parts > 1 && Person.safeParse(await stream.object).success, parts);
  });
  await check(`${provider}: tool loop of two steps`, async () => {
    const prepareStep = ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? { type: 'tool', toolName: 'weather' } : 'none' });
    const { steps } = await generateText({ ...own, maxOutputTokens: 150, tools: { weather }, stopWhen: stepCountIs(2), prepareStep });
    expect(steps.length === 2 && steps[0].toolResults.length === 1, steps.map((step) => step.finishReason));
  });
  await check(`${provider}: streamed tool input`, async () => {
    const stream = streamText({ ...own, maxOutputTokens: 150, tools: { weather }, toolChoice: { type: 'tool', toolName: 'weather' }, onError() {} });
    let deltas = 0;
    for await (const part of stream.fullStream) {
      if (part.type === 'error') throw part.error;
      deltas += part.type === 'tool-input-delta';
    }
    expect(deltas > 3, deltas);
  });
  for (const [type, inputSchema] of Object.entries(TYPES)) {
    await check(`${provider}: tool of zod type ${type}`, () =>
      generateText({ ...own, maxOutputTokens: 6, tools: { f: tool({ description: 'd', inputSchema, execute: async () => 1 }) } }));
  }
}
