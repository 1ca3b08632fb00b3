// SPDX-License-Identifier: Apache-2.0
/**
 * What S3's XML says: pages of listings, refusals, and what became of a batch of deletions.
 *
 * Contract: these documents are flat (Amazon S3 API reference: ListObjectsV2, DeleteObjects, Error responses), so elements are found
 * by name. A document that lacks what it must have is an error, not an empty answer.
 */
import type { ListedObject } from '../object-store.js';

export interface ListPage {
  readonly objects: readonly ListedObject[];
  /** Continuation token; undefined on the last page. */
  readonly next: string | undefined;
}

/** @throws Error naming what is missing */
export function parseListPage(xml: string): ListPage {
  const objects = [...xml.matchAll(/<Contents>(.*?)<\/Contents>/gs)].map(([, entry = '']) => {
    const key = element(entry, 'Key');
    const size = Number(element(entry, 'Size'));
    const modified = Date.parse(element(entry, 'LastModified') ?? '');
    if (key === undefined || !Number.isSafeInteger(size) || Number.isNaN(modified)) {
      throw new Error('an entry of the listing lacks its key, size or time');
    }
    return { key, size, modified, etag: unquoted(element(entry, 'ETag') ?? '') };
  });
  const truncated = element(xml, 'IsTruncated');
  const next = element(xml, 'NextContinuationToken');
  if (truncated === undefined) throw new Error('the answer is not a listing');
  if (truncated === 'true' && !next) throw new Error('the listing goes on, but not where');
  return { objects, next: truncated === 'true' ? next : undefined };
}

export interface Refusal {
  readonly code: string;
  readonly message: string;
  /** Where the bucket is, if it says so. */
  readonly region: string | undefined;
  readonly endpoint: string | undefined;
}

/** What S3 says of a request, or of one key of a batch; code and message are empty when the answer has none. */
export function parseRefusal(xml: string): Refusal {
  return {
    code: element(xml, 'Code') ?? '',
    message: element(xml, 'Message') ?? '',
    region: element(xml, 'Region'),
    endpoint: element(xml, 'Endpoint'),
  };
}

/** The keys of a batch that were not deleted. */
export function parseFailedDeletions(xml: string): (Refusal & { key: string })[] {
  if (!/<(\w+:)?DeleteResult[\s/>]/.test(xml)) throw new Error('the answer is not a DeleteResult');
  return [...xml.matchAll(/<Error>(.*?)<\/Error>/gs)].map(([, entry = '']) => ({
    key: element(entry, 'Key') ?? '',
    ...parseRefusal(entry),
  }));
}

export function deletionRequest(keys: readonly string[]): string {
  const objects = keys.map((key) => `<Object><Key>${escaped(key)}</Key></Object>`).join('');
  return `<Delete xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Quiet>true</Quiet>${objects}</Delete>`;
}

/** An entity tag without its quotes, and without the mark of a weak one. */
export function unquoted(etag: string): string {
  return etag.replace(/^(?:W\/)?"(.*)"$/, '$1');
}

function element(xml: string, name: string): string | undefined {
  const text = new RegExp(`<${name}>([^<]*)</${name}>`).exec(xml)?.[1];
  return text === undefined ? undefined : unescaped(text);
}

const named: Readonly<Record<string, string>> = {
  lt: '<',
  gt: '>',
  amp: '&',
  quot: '"',
  apos: "'",
};

function unescaped(text: string): string {
  return text.replace(/&(?:#x([0-9a-f]+)|#(\d+)|(\w+));/gi, (whole, hex, decimal, name) => {
    if (hex !== undefined) return String.fromCodePoint(Number.parseInt(hex, 16));
    if (decimal !== undefined) return String.fromCodePoint(Number(decimal));
    return named[name] ?? whole;
  });
}

function escaped(text: string): string {
  return text.replace(/[&<>]/g, (character) => `&#${character.charCodeAt(0)};`);
}
