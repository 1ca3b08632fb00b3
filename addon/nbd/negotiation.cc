// SPDX-License-Identifier: Apache-2.0
#include "negotiation.h"

#include <algorithm>

namespace tcmu::nbd {

namespace {

std::string_view asText(std::span<const uint8_t> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

void reply(std::vector<uint8_t>& out, Option option, OptionReply type,
           std::span<const uint8_t> data = {}) {
  Writer(out)
      .put(kOptionReplyMagic)
      .put(static_cast<uint32_t>(option))
      .put(static_cast<uint32_t>(type))
      .put(static_cast<uint32_t>(data.size()))
      .text(asText(data));
}

// An error, or with a type that takes it any other text.
Negotiation::Step refuse(std::vector<uint8_t>& out, Option option, OptionReply type,
                         std::string_view why) {
  reply(out, option, type, {reinterpret_cast<const uint8_t*>(why.data()), why.size()});
  return Negotiation::Step::taken;
}

// Takes fields off an option's data; none once one did not fit.
class Reader {
 public:
  explicit Reader(std::span<const uint8_t> data) : data_(data) {}
  template <std::unsigned_integral T>
  T take() {
    const auto bytes = takeBytes(sizeof(T));
    return bytes.empty() ? T{0} : load<T>(bytes.data());
  }
  // A string behind its 32-bit length.
  std::string_view takeText() {
    const auto length = take<uint32_t>();
    if (length > kStringLimit) valid_ = false;
    return asText(takeBytes(length));
  }
  bool atEnd() const { return valid_ && data_.empty(); }
  bool valid() const { return valid_; }

 private:
  std::span<const uint8_t> takeBytes(size_t count) {
    if (!valid_ || count > data_.size()) {
      valid_ = false;
      return {};
    }
    const auto taken = data_.first(count);
    data_ = data_.subspan(count);
    return taken;
  }
  std::span<const uint8_t> data_;
  bool valid_ = true;
};

}  // namespace

void Negotiation::greet(std::vector<uint8_t>& out) const {
  Writer(out)
      .put(kGreeting)
      .put(kOptionMagic)
      .put(static_cast<uint16_t>(kFixedNewstyle | kNoZeroes));
}

void Negotiation::secured() {
  secure_ = true;
  structured_ = allocation_ = false;
}

uint16_t Negotiation::flags() const {
  return static_cast<uint16_t>(disk_.flags | (structured_ ? flag::kDontFragment : 0));
}

Negotiation::Step Negotiation::take(std::span<const uint8_t>& in, std::vector<uint8_t>& out) {
  if (!greeted_) {
    if (in.size() < kClientFlagsBytes) return Step::incomplete;
    const auto flags = load<uint32_t>(in.data());
    in = in.subspan(kClientFlagsBytes);
    // Without fixed newstyle a client could not be told of any refusal.
    if ((flags & ~uint32_t{kFixedNewstyle | kNoZeroes}) || !(flags & kFixedNewstyle))
      return Step::end;
    noZeroes_ = flags & kNoZeroes;
    greeted_ = true;
    return Step::taken;
  }
  if (in.size() < kOptionHeaderBytes) return Step::incomplete;
  const auto length = load<uint32_t>(in.data() + 12);
  if (load<uint64_t>(in.data()) != kOptionMagic || length > kOptionLimit) return Step::end;
  if (in.size() - kOptionHeaderBytes < length) return Step::incomplete;
  const auto option = static_cast<Option>(load<uint32_t>(in.data() + 8));
  const auto data = in.subspan(kOptionHeaderBytes, length);
  in = in.subspan(kOptionHeaderBytes + length);
  return takeOption(option, data, out);
}

Negotiation::Step Negotiation::takeOption(Option option, std::span<const uint8_t> data,
                                          std::vector<uint8_t>& out) {
  if (option == Option::abort) {
    reply(out, option, OptionReply::ack);
    return Step::end;
  }
  if (option == Option::startTls) {
    if (config_.tls == TlsPolicy::none)
      return refuse(out, option, OptionReply::policy, "this server has no TLS");
    if (secure_) return refuse(out, option, OptionReply::invalid, "TLS is on already");
    if (!data.empty())
      return refuse(out, option, OptionReply::invalid, "STARTTLS takes no data");
    reply(out, option, OptionReply::ack);
    return Step::tls;
  }
  if (config_.tls == TlsPolicy::required && !secure_) {
    if (option == Option::exportName) return Step::end;
    return refuse(out, option, OptionReply::tlsRequired, "this server requires TLS");
  }
  switch (option) {
    case Option::list: {
      if (!data.empty()) return refuse(out, option, OptionReply::invalid, "LIST takes no data");
      std::vector<uint8_t> entry;
      Writer(entry)
          .put(static_cast<uint32_t>(config_.name.size()))
          .text(config_.name)
          .text(config_.description);
      reply(out, option, OptionReply::server, entry);
      reply(out, option, OptionReply::ack);
      return Step::taken;
    }
    case Option::structuredReply:
      if (!data.empty())
        return refuse(out, option, OptionReply::invalid, "STRUCTURED_REPLY takes no data");
      structured_ = true;
      reply(out, option, OptionReply::ack);
      return Step::taken;
    case Option::listMetaContext:
    case Option::setMetaContext:
      return metaContext(option, data, out);
    case Option::exportName:
    case Option::info:
    case Option::go:
      return selectExport(option, data, out);
    default:
      return refuse(out, option, OptionReply::unsupported, "unknown option");
  }
}

Negotiation::Step Negotiation::metaContext(Option option, std::span<const uint8_t> data,
                                           std::vector<uint8_t>& out) {
  if (option == Option::setMetaContext) allocation_ = false;
  if (!structured_)
    return refuse(out, option, OptionReply::invalid, "structured replies come first");
  Reader reader(data);
  const std::string_view name = reader.takeText();
  const auto queries = reader.take<uint32_t>();
  bool found = option == Option::listMetaContext && queries == 0;
  for (uint32_t i = 0; i < queries && reader.valid(); i++) {
    const std::string_view query = reader.takeText();
    found |= query == kAllocationContext || (option == Option::listMetaContext && query == "base:");
  }
  if (!reader.atEnd()) return refuse(out, option, OptionReply::invalid, "malformed queries");
  if (!isOurs(name)) return refuse(out, option, OptionReply::unknown, "no export of this name");
  if (found) {
    std::vector<uint8_t> context;
    const bool set = option == Option::setMetaContext;
    Writer(context).put(set ? kAllocationId : 0u).text(kAllocationContext);
    reply(out, option, OptionReply::metaContext, context);
    if (set) allocation_ = true;
  }
  reply(out, option, OptionReply::ack);
  return Step::taken;
}

Negotiation::Step Negotiation::selectExport(Option option, std::span<const uint8_t> data,
                                            std::vector<uint8_t>& out) {
  wanted_ = {option};
  if (option == Option::exportName) {
    return data.size() <= kStringLimit && isOurs(asText(data)) ? Step::describe : Step::end;
  }
  Reader reader(data);
  const std::string_view name = reader.takeText();
  const auto count = reader.take<uint16_t>();
  for (uint16_t i = 0; i < count && reader.valid(); i++) {
    const auto info = static_cast<Info>(reader.take<uint16_t>());
    wanted_.name |= info == Info::name;
    wanted_.description |= info == Info::description;
    wanted_.blockSize |= info == Info::blockSize;
  }
  if (!reader.atEnd())
    return refuse(out, option, OptionReply::invalid, "malformed information requests");
  if (!isOurs(name)) return refuse(out, option, OptionReply::unknown, "no export of this name");
  return Step::describe;
}

Negotiation::Step Negotiation::described(const std::optional<Disk>& disk,
                                         std::vector<uint8_t>& out) {
  const Option option = wanted_.option;
  if (!disk) {
    if (option == Option::exportName) return Step::end;
    return refuse(out, option, OptionReply::unknown, "the disk behind this export does not answer");
  }
  disk_ = *disk;
  if (option == Option::exportName) {
    Writer(out).put(disk_.size).put(flags()).zeroes(noZeroes_ ? 0 : 124);
    return Step::transmission;
  }
  std::vector<uint8_t> info;
  const auto send = [&] {
    reply(out, option, OptionReply::info, info);
    info.clear();
  };
  Writer(info).put(static_cast<uint16_t>(Info::exportSize)).put(disk_.size).put(flags());
  send();
  if (wanted_.name) {
    Writer(info).put(static_cast<uint16_t>(Info::name)).text(config_.name);
    send();
  }
  if (wanted_.description && !config_.description.empty()) {
    Writer(info).put(static_cast<uint16_t>(Info::description)).text(config_.description);
    send();
  }
  Writer(info)
      .put(static_cast<uint16_t>(Info::blockSize))
      .put(disk_.blockSize)
      .put(std::max(disk_.preferredSize, disk_.blockSize))
      .put(kMaxPayload);
  send();
  // Clients that ask for no sizes count on 512 bytes at most.
  if (option == Option::go && !wanted_.blockSize && disk_.blockSize > 512)
    return refuse(out, option, OptionReply::blockSizeRequired,
                  "logical blocks are larger than 512 bytes: ask for the block sizes");
  reply(out, option, OptionReply::ack);
  return option == Option::go ? Step::transmission : Step::taken;
}

}  // namespace tcmu::nbd
